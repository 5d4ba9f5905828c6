"""Runs of two processes that a signal, a lost process or torchrun stops: they end, and go on with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_runs import ROOT, ended_well, main, same_bits, small_run

from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.command import main_with_errors
from tests.stress.ranks import together

LONG = {
    "data__limit": 70,
    "data__held_out": 4,
    "phases": [{"epochs": 4, "batch_size": 4, "resolution": 14}],  # 17 steps: the processes agree after 16, too
    "selection": {"steps": 2},
    "averaging": {"decay": 0.5},
    "method": {"name": "fgsm", "init": "previous"},
    "model__name": "preact_resnet18_w16",
    "data__augment": {"crop": "none", "flip": True},
}


@pytest.fixture
def quick(config_file, few_bars, tmp_path):
    return lambda **changes: small_run(config_file, few_bars, tmp_path, **changes)


@pytest.fixture(scope="module")
def undisturbed(config_file, few_bars, tmp_path_factory):
    """The directory of a longer run, done by two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended_well(together(folder, main, str(small_run(config_file, few_bars, folder, **LONG)), "name=undisturbed"))
    return folder / "runs/undisturbed"


def begun(directory: Path):
    return lambda: (directory / run_directory.CHECKPOINT).exists()


def test_a_signal_to_one_process_stops_all_and_they_go_on_with_the_same_bits(quick, undisturbed, tmp_path):
    file, expected = quick(**LONG), undisturbed
    directory = tmp_path / "runs/stopped"
    processes = together(tmp_path, main, str(file), "name=stopped", when=begun(directory), signum=signal.SIGTERM)
    assert [p.status for p in processes] == [75, 75], "\n".join(p.output for p in processes)
    assert "stopped by SIGTERM; go on with" in processes[0].output
    position = run_directory.load_checkpoint(directory)[1]["position"]
    assert (position["pass"], position["step"]) != (0, 0) and not (directory / run_directory.SUMMARY).exists()
    assert ended_well(together(tmp_path, main, "--resume", str(directory)))
    assert same_bits(directory, expected)


def test_a_lost_process_ends_the_others_and_the_run_goes_on_with_the_same_bits(quick, undisturbed, tmp_path):
    file, expected = quick(**LONG), undisturbed
    directory = tmp_path / "runs/lost"
    processes = together(tmp_path, main, str(file), "name=lost", when=begun(directory), signum=signal.SIGKILL, limit=60)
    assert [p.status for p in processes] == [75, -signal.SIGKILL], "\n".join(p.output for p in processes)
    assert "another process was lost" in processes[0].output and "--resume" in processes[0].output
    assert "Traceback" not in processes[0].output
    assert ended_well(together(tmp_path, main, "--resume", str(directory)))
    assert same_bits(directory, expected)


def vanish() -> int:
    """Process 1 dies where nothing is trained yet."""

    def command() -> int:
        with distributed.joined("cpu") as (world, _):
            if world.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            world.gather(None)
        return 0

    return main_with_errors(command)


def test_a_process_that_is_lost_before_training_is_one_line_too(tmp_path):
    first, _ = together(tmp_path, vanish, limit=60)
    assert first.status == 75 and len(first.output.splitlines()) == 1 and "another process was lost" in first.output


def test_a_run_goes_on_with_another_number_of_processes(quick, tmp_path, capfd):
    directory = tmp_path / "runs/changed"
    together(tmp_path, main, str(quick(**LONG)), "name=changed", when=begun(directory), signum=signal.SIGTERM)
    assert main("--resume", str(directory)) == 0
    assert "begun by 2 process(es), now 1" in capfd.readouterr().out
    assert len((directory / run_directory.METRICS).read_text().splitlines()) == 4


def test_torchrun_starts_lost_processes_again(quick, undisturbed, tmp_path):
    """The real launcher. One process is killed; `--max-restarts` brings the run to the end of an undisturbed one."""
    file = quick(**LONG)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    directory, log = tmp_path / "runs/killed", tmp_path / "killed.log"
    with open(log, "w") as output:
        command = [*launch, "-m", "fastrobust.train", str(file), "name=killed"]
        job = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    while not begun(directory)() and job.poll() is None:
        time.sleep(0.02)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert job.wait(timeout=180) == 0, log.read_text()
    assert "going on after" in log.read_text()
    assert same_bits(directory, undisturbed)
