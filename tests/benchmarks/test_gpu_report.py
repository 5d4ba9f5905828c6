"""The GPU report with small made-up parts: order, limits, children, the archive, earlier results; and its real parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_probe, gpu_report, gpu_rows
from benchmarks.gpu_report import Part
from fastrobust.__main__ import parse
from fastrobust.config import reading

DEVICE = "Card 9000"
FACTS = {"device": DEVICE, "simulated": False, "commit": None, "sources": "abc", "data": "CIFAR-10 (JPEG), x", "gpu": True}
WRITES = "import json; json.dump({'milliseconds_per_step': 1}, open('result.json', 'w')); print('hello')"
ENDLESS = "import time\nwhile True: time.sleep(0.05)"


def part(name: str, code: str, group: int = 1, estimate: float = 0, limit: float = 20, **more) -> Part:
    return Part(group, name, estimate, limit, ["-c", code], **more)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(parts, *options) -> exit status. Results lie in tmp_path/results, the archive in tmp_path/out."""
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_report, "GRACE", 0.3)
    monkeypatch.setattr(gpu_report, "RESERVE", 0.0)
    monkeypatch.setattr(gpu_report, "probed", lambda out, limit: dict(FACTS))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def made(parts: list[Part], *options) -> int:
        monkeypatch.setattr(gpu_report, "parts", lambda home: parts)
        return gpu_report.main(["--out", str(tmp_path / "out"), *map(str, options)])

    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def state(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "results/Card_9000" / name / "state.json").read_text())


def archived(out: Path) -> set[str]:
    with tarfile.open(out / gpu_report.ARCHIVE) as archive:
        return {name.removeprefix("Card_9000/") for name in archive.getnames()}


def test_a_part_that_fails_stops_no_other_and_is_alone_done_again(call, tmp_path, capfd):
    order = tmp_path / "order"
    note = lambda name: f"open({str(order)!r}, 'a').write('{name} ')\n"
    fails = part("profile_a", note("a") + "print('why')\nraise SystemExit(3)")
    parts = [fails, part("profile_b", note("b") + WRITES), part("profile_c", note("c") + WRITES, group=2)]
    assert call(parts, "--parts", 1) == 1
    assert order.read_text() == "a b "
    said = capfd.readouterr().out
    assert (
        "profile_a: FAILED" in said
        and "exit status 3\n  | why" in said
        and "profile_b: DONE" in said
        and "profile_c" not in said
    )
    assert (state(tmp_path, "profile_a")["status"], state(tmp_path, "profile_a")["code"]) == ("failed", 3)
    parts[0] = part("profile_a", note("a") + WRITES)
    assert call(parts) == 0 and order.read_text() == "a b a c "


CHILDREN = """
import os, signal, subprocess, sys, time
print("before", flush=True)
open("half.json", "w").write("half")
signal.signal(2, signal.SIG_IGN)
stubborn = "import os, signal, time; signal.signal(2, signal.SIG_IGN); "
stubborn += "open('up%s', 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", stubborn % 1], start_new_session=True)  # leaves the group
middle = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn % 2!r}], start_new_session=True)"
subprocess.run([sys.executable, "-c", middle])  # its parent ends
time.sleep(600)
"""


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_part_that_does_not_end_is_killed_with_its_children(call, tmp_path):
    began = time.monotonic()
    assert call([part("profile_x", CHILDREN, limit=2), part("profile_y", WRITES)]) == 1
    assert time.monotonic() - began < 15
    folder = tmp_path / "results/Card_9000/profile_x"
    numbers = [int((folder / f"up{i}").read_text()) for i in (1, 2)]
    assert not any(map(alive, numbers))
    assert state(tmp_path, "profile_x")["status"] == "cut" and state(tmp_path, "profile_y")["status"] == "done"
    assert (folder / "half.json").read_text() == "half" and "before" in (folder / "log.txt").read_text()
    assert {"profile_x/half.json", "profile_x/log.txt", "profile_y/result.json"} <= archived(tmp_path / "out")


def test_a_part_may_say_what_it_has_before_it_is_killed(call, tmp_path):
    code = f"""
try:
    exec({ENDLESS!r})
except KeyboardInterrupt:
    print('{{"milliseconds_per_step": 2}}')
"""
    assert call([part("profile_x", code, limit=1)]) == 1
    log = (tmp_path / "results/Card_9000/profile_x/log.txt").read_text()
    assert gpu_rows.result_in(log, "profile_x") == {"milliseconds_per_step": 2}
    assert state(tmp_path, "profile_x")["status"] == "cut"


def test_children_that_outlive_a_part_are_ended(call, tmp_path):
    code = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {ENDLESS!r}])\n"
    code += "open('up', 'w').write(str(child.pid))"
    assert call([part("profile_x", code)]) == 0
    assert not alive(int((tmp_path / "results/Card_9000/profile_x/up").read_text()))


def test_the_archive_is_there_after_every_part_and_while_one_runs(call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "PACK_EVERY", 0.1)
    archive = str(tmp_path / "out" / gpu_report.ARCHIVE)
    after = f"import tarfile; tarfile.open({archive!r}).getmember('Card_9000/profile_a/state.json')"
    while_it_runs = f"""
import os, tarfile, time
while True:
    if os.path.exists({archive!r}) and "Card_9000/profile_c/log.txt" in tarfile.open({archive!r}).getnames(): break
    time.sleep(0.05)
"""
    assert call([part("profile_a", WRITES), part("profile_b", after), part("profile_c", while_it_runs)]) == 0
    assert os.listdir(tmp_path / "out") == [gpu_report.ARCHIVE]


def test_large_files_stay_and_long_logs_lose_their_head(call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "LARGEST", 1000)
    code = "open('weights', 'wb').write(bytes(2000)); print('x' * 2000 + 'the end')"
    assert call([part("profile_a", code)]) == 0
    assert archived(tmp_path / "out") == {"profile_a/log.txt", "profile_a/state.json"}
    with tarfile.open(tmp_path / "out" / gpu_report.ARCHIVE) as opened:
        log = opened.extractfile("Card_9000/profile_a/log.txt").read()
    assert len(log) == 1000 and log.endswith(b"the end\n")


def test_an_archive_that_is_there_is_not_lost(call, tmp_path, monkeypatch):
    assert call([part("profile_a", WRITES)]) == 0
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "another")
    assert call([part("profile_b", WRITES)]) == 0
    assert {"profile_a/result.json", "profile_b/result.json"} <= archived(tmp_path / "out")


@pytest.mark.parametrize("options", [("--minutes", -1), ("--minutes", "nan"), ("--earlier", "absent"), ("--parts", 5)])
def test_a_wrong_option_is_told(call, options, capfd):
    with pytest.raises(SystemExit, match="2"):
        call([], *options)
    assert options[0] in capfd.readouterr().err


@pytest.mark.parametrize("unpacked", [False, True])
def test_earlier_results_are_taken_and_not_measured_again(call, tmp_path, monkeypatch, capfd, unpacked):
    assert call([part("profile_a", WRITES), part("profile_b", "raise SystemExit(1)")]) == 1
    earlier = tmp_path / "earlier"
    (tmp_path / "out").rename(earlier)
    if unpacked:
        with tarfile.open(earlier / gpu_report.ARCHIVE) as opened:
            opened.extractall(earlier, filter="data")
        (earlier / gpu_report.ARCHIVE).unlink()
    (earlier / "damaged.tar.gz").write_bytes(b"\x1f\x8b\x08 no more")
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "another")
    again = [part("profile_a", "raise SystemExit(1)"), part("profile_b", WRITES)]
    assert call(again, "--earlier", earlier) == 0
    said = capfd.readouterr()
    assert "profile_a: done before" in said.out and "damaged.tar.gz cannot be read" in said.err
    assert {"profile_a/result.json", "profile_b/result.json"} <= archived(tmp_path / "out")


def test_results_of_another_device_are_kept_apart(call, tmp_path, monkeypatch):
    assert call([part("profile_a", WRITES)]) == 0
    monkeypatch.setattr(gpu_report, "probed", lambda out, limit: FACTS | {"simulated": True})
    assert call([part("profile_a", "raise SystemExit(1)")]) == 1
    assert {"profile_a/result.json", "SIMULATED_Card_9000/profile_a/state.json"} <= archived(tmp_path / "out")


def test_what_cannot_be_done_is_left_out_with_its_reason(call, tmp_path, capfd):
    parts = [
        part("profile_long", WRITES, estimate=1000),
        part("robust_0", WRITES, needs="../train_0/seed0"),
        part("profile_short", WRITES, estimate=2),
    ]
    assert call(parts, "--minutes", 0.5) == 0
    said = capfd.readouterr().out
    assert "profile_long: left out: no time left" in said
    assert "robust_0: left out: the weights of train_0 are not" in said
    assert state(tmp_path, "profile_short")["status"] == "done"


def test_all_images_are_attacked_once_the_weights_are_there(call, tmp_path):
    trains = "import os; os.mkdir('seed0'); open('seed0/model.safetensors', 'w')"
    attacks = "open('../train_0/seed0/model.safetensors')"
    assert call([part("train_0", trains), part("robust_0", attacks, needs="../train_0/seed0")]) == 0
    assert state(tmp_path, "robust_0")["status"] == "done"


def test_without_cifar_10_its_parts_are_left_out(call, monkeypatch, capfd):
    monkeypatch.setattr(gpu_report, "probed", lambda out, limit: {"device": DEVICE, "data_error": "DataError: not there"})
    assert call([part("train_0", WRITES, data=True)]) == 0
    assert "CIFAR-10 was not found: DataError: not there" in capfd.readouterr().out


def test_a_report_that_is_stopped_leaves_no_process_and_its_archive(tmp_path):
    endless = f"import os; print(os.getpid(), flush=True)\n{ENDLESS}"
    code = f"""
from pathlib import Path
from benchmarks import gpu_report as g
g.RESULTS, g.GRACE = Path({str(tmp_path)!r}) / "results", 0.3
g.probed = lambda out, limit: {FACTS!r}
g.parts = lambda home: [g.Part(1, "profile_a", 0, 60, ["-c", {endless!r}])]
raise SystemExit(g.main(["--out", {str(tmp_path / "out")!r}]))
"""
    report = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_report.ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "results/Card_9000/profile_a/log.txt"
    until = time.monotonic() + 20
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    report.terminate()
    assert report.wait(20) == 143
    assert not alive(int(log.read_text().split()[0]))
    assert {"profile_a/log.txt", "profile_a/state.json"} <= archived(tmp_path / "out")
    assert state(tmp_path, "profile_a")["status"] == "cut"


def test_a_training_that_was_cut_is_resumed_and_one_that_failed_begins_anew(tmp_path):
    train = gpu_report.train(1, 0)
    assert gpu_report.ready(train, tmp_path) == train
    gpu_probe.write(tmp_path / "seed0/config.yaml", "")
    resumed = ["-m", "fastrobust.train", "--resume", "seed0"]
    assert gpu_report.ready(train, tmp_path).command == resumed
    gpu_probe.write(tmp_path / "state.json", {"status": "cut"})
    assert gpu_report.ready(train, tmp_path).command == resumed
    gpu_probe.write(tmp_path / "state.json", {"status": "failed"})
    assert gpu_report.ready(train, tmp_path) == train and not (tmp_path / "seed0").exists()


# ---- the parts themselves


@pytest.fixture
def parts(tmp_path) -> dict[str, Part]:
    return {one.name: one for one in gpu_report.parts(tmp_path)}


def test_parts_are_in_order_and_the_first_fit_nine_minutes(parts, tmp_path):
    assert len(parts) == len(gpu_report.parts(tmp_path)) and next(iter(parts)) == "tests"
    groups = [one.group for one in parts.values()]
    assert groups == sorted(groups) and set(groups) == {1, 2, 3, 4}
    assert 60 + sum(one.estimate for one in parts.values() if one.group == 1) <= 9 * 60 - gpu_report.RESERVE
    assert all(one.estimate < one.limit < 600 and one.name.split("_")[0] in gpu_rows.KINDS for one in parts.values())


def test_the_documentation_has_every_part_with_its_estimate_and_limit(parts):
    table = [line for line in (gpu_report.ROOT / "docs/gpu.md").read_text().splitlines() if line.startswith("| `")]
    for name, one in parts.items():
        word = "`profile_ENGINE`" if name.startswith("profile_") else f"`{name}`"
        (row,) = (line for line in table if word in line.split("|")[1] and len(line.split("|")) == 7)
        assert str(one.group) in row and f"{one.estimate} s" in row and f"{one.limit} s" in row, name


def test_commands_can_be_read(parts):
    for name, one in parts.items():
        module, options = one.command[1], one.command[2:]
        if module == "fastrobust.train":
            parse(["train", *options])
            config = reading.load(options[0], options[1:])
            assert (config.evaluation.steps, config.evaluation.restarts, config.engine) == (50, 10, "auto"), name
        elif module == "fastrobust":
            options = parse(options)
            assert (options.run, options.limit) == (one.needs, 10_000)
        elif module == "pytest":
            files = [Path(word) for word in options if word.endswith(".py")]
            first = "tests/attack/test_threat_kernels.py" if name == "tests_kernels" else "tests/test_gpu.py"
            assert gpu_report.ROOT / first in files and len(files) > 2 and all(file.exists() for file in files)
        else:
            source = "".join(
                (gpu_report.ROOT / f"{file}.py").read_text() for file in (module.replace(".", "/"), "benchmarks/measure")
            )
            assert all(f'"{word}"' in source for word in options if word.startswith("--")), name


def test_the_evaluation_takes_the_trained_network_where_it_is(parts, tmp_path):
    assert "--run" not in parts["evaluate"].command
    weights = tmp_path / "train_1/seed1/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    there = next(one for one in gpu_report.parts(tmp_path) if one.name == "evaluate")
    assert there.command[-2:] == ["--run", "../train_1/seed1"]


# ---- the probe


def test_a_machine_without_a_gpu_is_told(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    assert gpu_report.report([1], 5, tmp_path / "out", None) == 2
    assert "no CUDA GPU" in capfd.readouterr().err
    with tarfile.open(tmp_path / "out" / gpu_report.ARCHIVE) as archive:
        assert "unknown_device/probe/result.json" in archive.getnames()


def test_only_the_official_files_are_cifar_10():
    assert gpu_probe.data_name(Path("data/cifar-10-batches-py")) == "CIFAR-10"
    assert gpu_probe.data_name(Path("data/cifar10-jpeg")) == "CIFAR-10 (JPEG), cifar10-jpeg"
    assert gpu_probe.data_name(Path("data/cifar10")) == "CIFAR-10 from cifar10"


def test_rows_say_what_they_are_about(call, tmp_path, monkeypatch, capsys):
    assert gpu_rows.main([str(tmp_path)]) == 2 and "no results" in capsys.readouterr().err
    print_result = (
        "import json; print(json.dumps(dict(attack='pgd-50-10', epsilon=8/255, clean_accuracy=.8, robust_accuracy=.45,"
    )
    print_result += " robust_interval=[.44, .46], examples=10000, seconds=float('nan'))))"
    assert call([part("robust_0", print_result, data=True)]) == 0
    capsys.readouterr()
    gpu_rows.main([str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"### {DEVICE}" in said and "SIMULATED" not in said
    (row,) = (line for line in said.splitlines() if "PGD-50-10, epsilon 8/255" in line)
    assert "45.00% (95 %: 44.00% to 46.00%), n = 10,000" in row and "robust_0, CIFAR-10 (JPEG), x" in row
    assert "code abc" in row and row.count("|") == 7
    assert "| seconds of the attack | not a number |" in said
    monkeypatch.setattr(gpu_report, "probed", lambda out, limit: FACTS | {"simulated": True})
    assert call([part("robust_0", print_result, data=True)]) == 0
    assert "[SIMULATED, NOT MEASURED: Card 9000]" in capsys.readouterr().out
    gpu_rows.main([str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "### SIMULATED, NOT MEASURED" in said and said.count("robust_0, CIFAR-10 (JPEG), x, SIMULATED") == 3
