"""The quick form of `make stress`: a few kills, disks and damaged files of each kind. A part with a fault lists it."""

from __future__ import annotations

import importlib
import json
import signal
import time
from pathlib import Path

import pytest

from fastrobust.runtime.errors import DataError
from tests.stress import __main__, child, fuzz, kills, parts


@pytest.mark.parametrize("name", parts.PARTS)
def test_quick_form_of(name, tmp_path):
    figures = parts.PARTS[name].run(tmp_path, parts.PARTS[name].quick)
    if "skipped" in figures:
        pytest.skip(figures["skipped"])
    assert figures["wrong"] == []


# ---- the harness itself notices what it is for


def test_what_is_imported_before_processes_are_forked_can_be_imported():
    """The server that forks would pass over what is missing, and every process would import it again."""
    for name in child.WARM:
        importlib.import_module(name)


def counting(folder: str) -> int:
    Path(folder, "state").write_text("[0, 1, 2]")
    return 0


def working(folder: str) -> int:
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    return counting(folder)


def job_of(function) -> kills.Job:
    return kills.Job(
        lambda folder: (function, str(folder)),
        lambda folder: (folder / "state").exists(),
        lambda folder: (folder / "state").read_text(),
        lambda folder: "somewhere",
    )


def test_a_killed_job_that_looks_whole_is_a_fault(tmp_path):
    job = job_of(working)
    found = kills.kill_at_random(job, tmp_path / "a", 2)
    assert found["kills"] == 2 and found["stages"] == {"somewhere": 2} and found["wrong"] == []
    found = kills.kill_at_random(job._replace(sound=lambda folder: "half of it looks whole"), tmp_path / "b", 1)
    assert [text.partition(": ")[2] for text in found["wrong"]] == ["half of it looks whole"]


def test_a_job_with_another_result_is_a_fault(tmp_path):
    job = job_of(counting)
    folder = tmp_path / "job"
    folder.mkdir()
    assert kills.finish(job, folder, "[0, 1, 2]") is None
    assert "another result" in kills.finish(job, folder, "[0, 1, 3]")
    (folder / ".state.half").write_text("")
    assert "left behind" in kills.finish(job, folder, "[0, 1, 2]")


def crash() -> int:
    import ctypes

    return ctypes.string_at(0) and 0


def test_a_crash_and_a_hang_of_the_interpreter_are_seen(tmp_path):
    assert child.run(crash, log=tmp_path / "log").status == -signal.SIGSEGV
    assert child.run(signal.pause, log=tmp_path / "log", limit=0.5).status == -signal.SIGKILL


def test_verdicts_of_the_fuzzer(tmp_path):
    file = tmp_path / "file.bin"

    def raises(error):
        raise error

    def verdict(read, has_checksum=True):
        return fuzz.judge(fuzz.Target(file, b"", read, has_checksum, fuzz.mutate_bytes), "right")[0]

    assert verdict(lambda: "right") == "read correctly"
    assert verdict(lambda: raises(DataError(f"{file} is bad"))) == "refused"
    assert verdict(lambda: "wrong", False) == "read as something else"
    assert verdict(lambda: "wrong") == "a bug: a change went unnoticed"
    assert verdict(lambda: raises(DataError("it is bad"))) == "a bug: the file is not named"
    assert verdict(lambda: raises(KeyError("x"))) == "a bug: KeyError"


def test_figures_are_written_with_their_command_and_faults_are_a_failure(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    good = parts.Part(lambda folder, count: {"n": count, "wrong": []}, 50, 1)
    bad = good._replace(run=lambda folder, count: {"wrong": ["x"]})
    monkeypatch.setattr(__main__, "PARTS", {"a": good, "b": bad})
    assert __main__.main(["a", "--quick", "--json", str(file)]) == 0
    assert __main__.main(["b", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["a"]["command"] == "python -m tests.stress a --count 1" and found["a"]["n"] == 1
    assert found["b"]["wrong"] == ["x"]
    assert __main__.main(["c"]) == 2
    assert "there is no part c; there are a, b" in capsys.readouterr().err
