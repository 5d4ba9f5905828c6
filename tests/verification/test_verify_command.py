"""The verify command and the curve made from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.data.held_out import SPREAD, spread
from fastrobust.models.weights import build_model, save_weights
from fastrobust.runtime.errors import RunError
from fastrobust.verification import workers
from fastrobust.verification.store import VERDICTS, Verdicts

pytest.importorskip("highspy")


def arguments(folder, *more) -> list[str]:
    return [str(folder), "--epsilon", "0.004", "--limit", "12", "--workers", "1", "--timeout", "20", "--json", *more]


@pytest.fixture(scope="module")
def verified(finished_run, tmp_path_factory):
    """(output folder, the summary) of a finished verification."""
    output = tmp_path_factory.mktemp("verified")
    assert cli(["verify", *arguments(finished_run), "--output", str(output)]) == 0
    return output, json.loads((output / "summary.json").read_text())


def test_the_command_decides_every_image_and_says_how(verified):
    output, summary = verified
    assert summary["examples"] == 12
    assert sum(summary[name] for name in VERDICTS) == 12 == sum(summary["by"].values())
    lines = [json.loads(line) for line in (output / "verdicts.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == spread(np.repeat(range(10), 20), range(10), 12).tolist()
    assert summary["chosen"] == SPREAD
    falsified = {line["index"] for line in lines if line["verdict"] == "falsified"}
    assert {int(file.stem) for file in (output / "witnesses").iterdir()} == falsified
    for index in falsified:
        assert np.load(output / "witnesses" / f"{index}.npy").dtype == np.float32


def test_the_curve_of_a_weights_file(finished_run, tmp_path, monkeypatch):
    from benchmarks import verification

    (tmp_path / "some_run").mkdir()
    weights = shutil.copy(finished_run / "model.safetensors", tmp_path / "some_run")
    options = ["--epsilons", "0.004", "0.002", "--limit", "3", "--workers", "1", "--output", str(tmp_path / "curve")]
    monkeypatch.setattr("sys.argv", ["verification", str(weights), *options])
    assert verification.main() == 0
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["run"] == "some_run" and [point["epsilon"] for point in curve["points"]] == [0.002, 0.004]
    assert all(point["examples"] == 3 for point in curve["points"])
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_command_again_decides_nothing_anew_and_a_torn_line_once_more(verified, finished_run, capsys, tmp_path):
    output, summary = verified
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    lines = (copy / "verdicts.jsonl").read_bytes()
    (copy / "verdicts.jsonl").write_bytes(lines[:-20])
    assert cli(["verify", *arguments(finished_run), "--output", str(copy)]) == 0
    text = capsys.readouterr().out
    assert "11 of 12 images have been decided before" in text
    again = json.loads(text.splitlines()[-1])
    assert {name: again[name] for name in VERDICTS} == {name: summary[name] for name in VERDICTS}
    assert again["decided_now"] == 1
    assert len((copy / "verdicts.jsonl").read_text().splitlines()) == 12


def test_verdicts_about_something_else_are_not_mixed(verified, finished_run, capsys):
    output, _ = verified
    other = [*arguments(finished_run), "--output", str(output)]
    other[2] = "0.005"
    assert cli(["verify", *other]) == 2
    assert "something else (epsilon differ)" in capsys.readouterr().err


def test_verdicts_of_the_same_weights_with_other_code_are_not_mixed(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)]
    one, other = nn.Sequential(*layers), nn.Sequential(*layers[:2], nn.LeakyReLU(0.9), layers[3])
    x = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    options = {"epsilon": 0.02, "workers": 1, "output": tmp_path}
    fastrobust.verify(one, x, torch.tensor([0, 1, 2]), **options)
    with pytest.raises(RunError, match="verdicts about other code of the model with these weights"):
        fastrobust.verify(other, x, torch.tensor([0, 1, 2]), **options)


def test_damaged_verdicts_are_an_error(verified, finished_run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(verified[0], copy)
    content = (copy / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (copy / "verdicts.jsonl").write_text("".join([content[0], "nonsense\n", *content[1:]]))
    assert cli(["verify", *arguments(finished_run), "--output", str(copy)]) == 2
    assert "is damaged after 1 verdicts" in capsys.readouterr().err
    (copy / "settings.json").write_text("{")
    assert cli(["verify", *arguments(finished_run), "--output", str(copy)]) == 2
    assert "settings.json is damaged" in capsys.readouterr().err


def test_a_timeout_is_tried_again_only_with_more_time():
    record = {"verdict": "timeout", "seconds": 10.2}
    assert workers.settled(record, 10) and not workers.settled(record, 30) and not workers.settled(None, 1)
    assert workers.settled({"verdict": "verified", "seconds": 0.1}, 30)


def smooth(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 2, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, classes)
    )


def test_a_network_that_cannot_be_verified_is_an_error(tmp_path, settings, capsys):
    parsed = reading.parse(settings(tmp_path, model__name=f"{__name__}:smooth"), "test")
    classes = tuple(f"bar{i}" for i in range(10))
    save_weights(tmp_path, build_model(parsed, classes), parsed, classes)
    assert cli(["verify", str(tmp_path / "model.safetensors"), "--epsilon", "0.1"]) == 2
    assert "verification: GELU ('network.1') is not supported: torch's gelu" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_no_process_outlives_a_command_that_is_killed(finished_run, tmp_path):
    command = [sys.executable, "-m", "fastrobust", "verify", *arguments(finished_run), "-o", str(tmp_path / "verdicts")]
    command[command.index("--workers") + 1] = "2"
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def workers() -> list[Path]:
        listed = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        return [Path("/proc", pid) for pid in listed if b"spawn_main" in Path("/proc", pid, "cmdline").read_bytes()]

    def runs(process: Path) -> bool:
        try:
            return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 60
    while len(workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    alive = workers()
    assert len(alive) == 2
    killed.kill()
    killed.wait()
    while any(map(runs, alive)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, alive))


def test_bad_arguments(finished_run, capsys):
    assert cli(["verify", str(finished_run), "--epsilon", "0"]) == 2
    assert "larger than 0" in capsys.readouterr().err
    assert cli(["verify", str(finished_run), "--epsilon", "0.1", "--device", "cuda:99"]) == 2
    assert "cuda:99 is not there" in capsys.readouterr().err
    for mistake in (["--epsilon", "0.1", "--timeout", "nan"], ["--epsilon", "0.1", "--timeout", "0"], ["--epsilon", "8"]):
        with pytest.raises(SystemExit) as caught:
            cli(["verify", str(finished_run), *mistake])
        assert caught.value.code == 2 and "error: argument" in capsys.readouterr().err
    with pytest.raises(RunError):
        Verdicts(finished_run / "config.yaml" / "x", {}, {})


def test_fewer_images_do_not_take_the_place_of_more(verified, finished_run, capsys, tmp_path):
    """The model card and the page tell what summary.json holds."""
    output, summary = verified
    copy = shutil.copytree(output, tmp_path / "copy")
    assert cli(["verify", *arguments(finished_run, "--limit", "5"), "--output", str(copy)]) == 0
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1])["examples"] == 5 and "summary.json keeps the result on 12 images" in text
    assert json.loads((copy / "summary.json").read_text()) == summary
