"""Mistakes of users, from wrong keys to a full disk: each is explained in one message, and no work is lost."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys

import pytest
from run_files import FILES, assert_explained, assert_scalars_are_the_metrics, summary_of

from fastrobust.__main__ import main as cli


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copied")


@pytest.mark.parametrize(
    "change, message",
    [
        ("metod.name=fgsm", "unknown key 'metod'; did you mean 'method'?"),
        ("method.alfa=0.1", "did you mean 'method.alpha'?"),
        ("epsilon=8", "did you mean 8/255?"),
        ("epsilon", "'epsilon' is not of the form key=value"),
        ("data.path=absent", "image_folder was not found"),
        ("data.dataset=minst", "did you mean 'mnist'?"),
        ("model.name=mnist_nett", "there is no model 'mnist_nett'; did you mean 'mnist_net'?"),
        ("phases.0.batch_size=71", "phases.0.batch_size is 71, but there are only 70 images"),
        ("phases.0.resolution=20", "mnist_net"),  # takes 28 x 28 alone
        ("device=cuda:99", "cuda:99 is not there"),
        ("schedule.max_lr=1e30", "training diverged"),
    ],
)
def test_a_mistake_in_the_config_is_explained(quick, tmp_path, capsys, change, message):
    changes = {"optimizer": {"name": "sgd"}} if "max_lr" in change else {}
    assert_explained(capsys, cli(["train", str(quick(**changes)), change]), message)
    assert not (tmp_path / "runs" / "bars" / "summary.json").exists()
    if "max_lr" not in change:
        assert not (tmp_path / "runs").exists()  # nothing is left behind


@pytest.mark.parametrize("text, message", [("", "must hold `key: value` lines"), ("a: [", "is not valid YAML")])
def test_a_config_that_is_no_config_is_explained(tmp_path, capsys, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert_explained(capsys, cli(["train", str(file)]), message)


def test_no_config_at_all_is_explained(capsys):
    assert_explained(capsys, cli(["train"]), "name a config file")


def test_a_truncated_image_is_explained(quick, few_bars, tmp_path, capsys):
    data = shutil.copytree(few_bars, tmp_path / "data")
    file = data / "train" / "bar3" / "0003.png"
    file.write_bytes(file.read_bytes()[:300])
    assert_explained(capsys, cli(["train", str(quick(data__path=str(data)))]), f"{file} is not a usable image")


def test_a_truncated_test_image_does_not_lose_the_training(quick, few_bars, tmp_path, capsys):
    data = shutil.copytree(few_bars, tmp_path / "data")
    file = data / "test" / "bar3" / "0003.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:300])
    config = quick(data__path=str(data))
    assert_explained(capsys, cli(["train", str(config)]), f"{file} is not a usable image")
    file.write_bytes(whole)
    directory = tmp_path / "runs" / "bars"
    if directory.exists():
        assert cli(["train", "--resume", str(directory)]) == 0
    else:
        assert cli(["train", str(config)]) == 0
    assert summary_of(directory)["examples"] == 20


def test_a_truncated_data_file_is_explained(quick, tmp_path, capsys):
    data = tmp_path / "mnist"
    data.mkdir()
    header = {"images-idx3": struct.pack(">4I", 0x803, 100, 28, 28), "labels-idx1": struct.pack(">2I", 0x801, 100)}
    for split in ("train", "t10k"):
        for name, head in header.items():
            (data / f"{split}-{name}-ubyte").write_bytes(head + bytes(50))
    config = quick(data={"dataset": "mnist", "path": str(data)})
    assert_explained(capsys, cli(["train", str(config)]), "train-images-idx3-ubyte is truncated")


def test_an_existing_run_is_not_overwritten(quick, tmp_path, capsys):
    config = str(quick())
    assert cli(["train", config]) == 0
    directory = tmp_path / "runs" / "bars"
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert_explained(capsys, cli(["train", config, "seed=1"]), f"continue it with `--resume {directory}`")
    assert {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()} == before


def test_an_output_that_is_a_file_is_explained(quick, tmp_path, capsys):
    config = quick()
    (tmp_path / "runs").write_text("")
    assert_explained(capsys, cli(["train", str(config)]), "")


@pytest.mark.parametrize(
    "case", ["no run", "absent", "other config", "overrides", "damaged checkpoint", "empty checkpoint", "damaged config"]
)
def test_a_mistake_in_resuming_is_explained(quick, copied_run, tmp_path, capsys, case):
    (copied_run / "summary.json").unlink()
    argv, message = {
        "no run": (["--resume", str(tmp_path)], "is not a run directory"),
        "absent": (["--resume", str(tmp_path / "absent")], "absent does not exist: no run was saved there"),
        "other config": ([str(quick()), "--resume", str(copied_run), "epsilon=0.03"], "epsilon: 0.05 before, 0.03 now"),
        "overrides": (["--resume", str(copied_run), "seed=1"], "seed: 0 before, 1 now"),
        "damaged checkpoint": (["--resume", str(copied_run)], "checkpoint.pt is damaged"),
        "empty checkpoint": (["--resume", str(copied_run)], "checkpoint.pt is damaged"),
        "damaged config": (["--resume", str(copied_run)], "config.yaml"),
    }[case]
    if "checkpoint" in case:
        (copied_run / "checkpoint.previous.pt").unlink()
        (copied_run / "checkpoint.pt").write_bytes(b"PK\3\4 ..." if case.startswith("damaged") else b"")
    if case == "damaged config":
        (copied_run / "config.yaml").write_text("epsilon: 0.1\nepsilom: 0.2\n")
    assert_explained(capsys, cli(["train", *argv]), message)


def test_resuming_with_the_same_config_is_fine(quick, tmp_path, capsys):
    config = str(quick())
    assert cli(["train", config, "seed=2"]) == 0
    directory = tmp_path / "runs" / "bars"
    assert cli(["train", config, "seed=2", "--resume", str(directory)]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    ["absent", "folder", "no weights", "damaged", "no data", "no gpu", "no device", "too large", "too long", "other norm"],
)
def test_a_mistake_in_evaluating_is_explained(copied_run, tmp_path, capsys, case):
    argv, message = {
        "absent": ([str(tmp_path / "absent.safetensors")], "there are no weights at"),
        "folder": ([str(tmp_path)], f"; name one of the runs in {tmp_path}, such as {copied_run}"),
        "no weights": ([str(copied_run)], f"the run is not finished: `fastrobust train --resume {copied_run}`"),
        "damaged": ([str(copied_run)], "model.safetensors is damaged"),
        "no data": ([str(copied_run), "--data", str(tmp_path / "absent")], "image_folder was not found"),
        "too large": ([str(copied_run), "--epsilon", "8"], "did you mean 8/255?"),
        "too long": ([str(copied_run), "--alpha", "2"], "did you mean 2/255?"),
        "other norm": ([str(copied_run), "--norm", "l2"], "--norm l2 needs --epsilon"),
        "no gpu": ([str(copied_run), "--device", "cuda:99"], "cuda:99 is not there"),
        "no device": ([str(copied_run), "--device", "gpu"], "gpu"),
    }[case]
    if case == "no weights":
        (copied_run / "model.safetensors").unlink()
    if case == "damaged":
        (copied_run / "model.safetensors").write_bytes((copied_run / "model.safetensors").read_bytes()[:-100])
    assert_explained(capsys, cli(["evaluate", *argv]), message)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epsilon", "inf"], "inf is not a number from 0"),
        (["--epsilon", "x"], "not a number"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--restarts", "ten"], "'ten' is not a whole number"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli(["evaluate", "runs/x", *arguments])
    assert_explained(capsys, caught.value.code, message)


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "fastrobust.train", "absent.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr == (
        "error: config file absent.yaml does not exist\n`fastrobust configs` lists those that come with fastrobust\n"
    )


def test_a_full_disk_in_the_middle_of_a_run_can_be_resumed_from(quick, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "runs" / "bars"
    flush = os.fsync

    def fsync(handle):
        if (directory / "metrics.jsonl").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert_explained(capsys, cli(["train", str(quick())]), "No space left on device")
    assert cli(["train", "--resume", str(directory)]) == 0
    assert {file.name for file in directory.iterdir() if not file.name.startswith("events")} == FILES
    assert_scalars_are_the_metrics(directory)  # the first epoch, done twice, is there once
