"""The commands `fastrobust train` and `fastrobust evaluate`: what they leave, print and return, and how they fail. They are
called in this process where that shows the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys

import pytest
import torch
import yaml

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.data import sets
from fastrobust.evaluation.accuracy import evaluate
from fastrobust.runtime import run_directory
from fastrobust.runtime.command import to_paste
from fastrobust.train import start
from fastrobust.train.step import Step

FILES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "model.safetensors",
    "summary.json",
}
QUICK = {"phases": [{"epochs": 2, "batch_size": 35, "resolution": 28}], "evaluation": {"steps": 1, "restarts": 1}}


@pytest.fixture
def quick(config_file, few_bars, tmp_path):
    """quick(**changes) -> the config file of a run of four updates in tmp_path/runs/bars."""
    return lambda **changes: config_file(tmp_path, **({"data__path": str(few_bars)} | QUICK | changes))


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copied")


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars_of(directory):
    """tag -> [(step, value), ...] from the TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_scalars_are_the_metrics(directory):
    metrics, scalars = metrics_of(directory), scalars_of(directory)
    for tag in ("loss", "train_accuracy", "learning_rate", "seconds", "images_per_second"):
        assert [step for step, _ in scalars[tag]] == [record["updates"] for record in metrics]
        assert [value for _, value in scalars[tag]] == pytest.approx([record[tag] for record in metrics], rel=1e-6)
    return scalars


# ---- a run from one end to the other


def test_training_leaves_a_whole_run_directory(finished_run):
    names = {file.name for file in finished_run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names == FILES | events
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert config["method"] == {
        "name": "fgsm", "init": "random", "alpha": 0.0625, "attack_batchnorm": "train", "clip_start": True,
        "ibp_weight": 0.0,
    }  # fmt: skip
    assert len(metrics_of(finished_run)) == 3


def test_the_summary_is_what_the_trained_model_does(finished_run, bars):
    summary = summary_of(finished_run)
    facts = {
        "attack": "pgd-7-2", "epsilon": 0.1, "alpha": 0.025, "examples": 200, "method": "fgsm", "dataset": "image_folder",
        "name": "bars", "model": "mnist_net", "epochs": 3, "stopped": None, "training_epsilon": 0.05, "seed": 0,
    }  # fmt: skip
    assert {key: summary[key] for key in facts} == facts
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["fastrobust"] == fastrobust.__version__
    assert {"device", "cpu", "cores"} <= summary["hardware"].keys()
    seconds = sum(record["seconds"] for record in metrics_of(finished_run))
    assert summary["train_seconds"] == pytest.approx(seconds)
    assert summary["seconds_per_epoch"] == pytest.approx(seconds / 3)

    model, test = fastrobust.load(finished_run), sets.load("image_folder", "test", bars, resolution=28)
    for e, epsilon in zip(summary["evaluations"], (0.1, 0.05), strict=True):
        settings = {"threat": Threat(epsilon), "alpha": epsilon / 4, "steps": 7, "restarts": 2}
        verdicts = pgd(model, test.images, test.labels, **settings)
        assert e["epsilon"] == epsilon
        assert e["clean_accuracy"] == verdicts.clean.sum().item() / 200
        assert e["robust_accuracy"] == verdicts.robust.sum().item() / 200
    for key in ("clean_accuracy", "robust_accuracy"):
        assert summary[key] == summary["evaluations"][0][key]
    assert 0.1 < summary["robust_accuracy"] < summary["clean_accuracy"]
    assert summary["clean_accuracy"] > 0.8  # it has learnt


def test_tensorboard_shows_the_metrics(finished_run):
    scalars = assert_scalars_are_the_metrics(finished_run)
    guarded = [(record["updates"], record["guard_accuracy"]) for record in metrics_of(finished_run)]
    assert [step for step, _ in scalars["guard_accuracy"]] == [step for step, _ in guarded]
    assert [v for _, v in scalars["guard_accuracy"]] == pytest.approx([v for _, v in guarded])


def test_what_training_prints(quick, tmp_path, capsys):
    assert cli(["train", str(quick()), "seed=3", "name=other"]) == 0
    out = capsys.readouterr().out
    directory = tmp_path / "runs" / "other"
    assert yaml.safe_load((directory / "config.yaml").read_text())["seed"] == 3
    summary = summary_of(directory)
    assert "epoch   1/2" in out and "epoch   2/2" in out and "left" in out
    assert f"{summary['clean_accuracy']:.2%}" in out
    assert f"{summary['robust_accuracy']:.2%}" in out
    assert "pgd-1-1" in out
    assert f"evaluate again:  {to_paste('evaluate', directory)}\n" in out
    assert f'fastrobust.load("{directory}")' in out


def test_a_dry_run_shows_the_plan_and_writes_nothing(quick, tmp_path, capsys):
    assert cli(["train", str(quick()), "--dry-run", "precision=bf16"]) == 0
    shown = capsys.readouterr()
    assert "70 × 28²" in shown.out and "training about" in shown.out and "nothing was written" in shown.out
    assert "precision bf16 is meant for GPUs" in shown.err
    assert not (tmp_path / "runs").exists()
    assert cli(["train", str(quick()), "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def test_a_finished_run_is_resumed_by_showing_its_summary(finished_run, capsys):
    def state():
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in finished_run.iterdir() if file.is_file()}

    before = state()
    assert cli(["train", "--resume", str(finished_run)]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out
    assert f"{summary_of(finished_run)['robust_accuracy']:.2%}" in out
    assert state() == before


# ---- evaluate


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("which, arguments", [(0, []), (1, ["--epsilon", "0.05"]), (1, ["--epsilon", "1/20"])])
def test_evaluate_finds_what_the_summary_says(finished_run, capsys, which, arguments):
    assert cli(["evaluate", str(finished_run), "--device", "cpu", "--json", *arguments]) == 0
    found = last_line(capsys)
    expected = summary_of(finished_run)["evaluations"][which]
    assert found.pop("seconds") > 0
    assert expected.pop("seconds") > 0
    assert {key: found[key] for key in expected} == expected
    assert expected.keys() == {
        "clean_accuracy", "clean_interval", "robust_accuracy", "robust_interval", "robust_accuracy_after_one_restart",
        "examples", "resolution", "epsilon", "attack", "alpha",
    }  # fmt: skip


def test_evaluate_settings_are_those_of_the_command_line(finished_run, capsys, few_bars, tmp_path):
    alone = shutil.copy(finished_run / "model.safetensors", tmp_path / "weights.safetensors")
    asked = ["--epsilon", "8/255", "--alpha", "0.01", "--steps", "3", "--restarts", "1", "--limit", "15", "--seed", "4"]
    asked += ["--batch-size", "7", "--device", "cpu", "--json"]
    assert cli(["evaluate", str(alone), "--data", str(few_bars), *asked]) == 0
    found = last_line(capsys)
    assert found.pop("seconds") > 0
    test = sets.load("image_folder", "test", few_bars, resolution=28, limit=15)
    expected = evaluate(fastrobust.load(alone), test, epsilon=8 / 255, alpha=0.01, steps=3, restarts=1, batch_size=7, seed=4)
    assert expected.pop("seconds") > 0
    assert {key: found[key] for key in expected} == expected
    assert found["examples"] == 15


def test_evaluate_prints_for_people(finished_run, capsys):
    assert cli(["evaluate", str(finished_run), "--device", "cpu", "--epsilon", "8/255", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert f"clean accuracy   {summary_of(finished_run)['clean_accuracy']:.2%}" in out
    assert "pgd-1-2, epsilon 8/255" in out
    assert "{" not in out


def test_epsilon_0_is_clean_accuracy(finished_run, capsys):
    assert cli(["evaluate", str(finished_run), "--device", "cpu", "--epsilon", "0", "--steps", "1", "--json"]) == 0
    found = last_line(capsys)
    assert found["epsilon"] == 0
    assert found["robust_accuracy"] == found["clean_accuracy"] == summary_of(finished_run)["clean_accuracy"]


# ---- mistakes


def assert_explained(capsys, code, message):
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert message in err


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
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    capsys.readouterr()
    assert_explained(capsys, cli(["train", config, "seed=1"]), f"continue it with `--resume {directory}`")
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


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
        "absent": (["--resume", str(tmp_path / "absent")], "is not a run directory"),
        "other config": ([str(quick()), "--resume", str(copied_run), "epsilon=0.03"], "epsilon: 0.05 in one, 0.03 in the"),
        "overrides": (["--resume", str(copied_run), "seed=1"], "seed=1 cannot change it"),
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


@pytest.mark.parametrize("case", ["absent", "folder", "no weights", "damaged", "no data", "no gpu", "no device"])
def test_a_mistake_in_evaluating_is_explained(copied_run, tmp_path, capsys, case):
    argv, message = {
        "absent": ([str(tmp_path / "absent.safetensors")], "there are no weights at"),
        "folder": ([str(tmp_path)], "there are no weights at"),
        "no weights": ([str(copied_run)], f"the run is not finished: `--resume {copied_run}`"),
        "damaged": ([str(copied_run)], "model.safetensors is damaged"),
        "no data": ([str(copied_run), "--data", str(tmp_path / "absent")], "image_folder was not found"),
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
        (["--epsilon", "8"], "did you mean 8/255?"),
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
    assert found.stderr == "error: config file absent.yaml does not exist\n"


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


# ---- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_real_run_which_can_be_resumed(quick, tmp_path, capsys, signum):
    epochs = 25
    config = quick(guard={"action": "off"}, phases=[{"epochs": epochs, "batch_size": 35, "resolution": 28}])
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrobust.train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                process.send_signal(signum)
                break
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    directory = tmp_path / "runs" / "bars"
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[signum]
    assert err == f"stopped by {signum.name}; go on with: python -m fastrobust.train --resume {directory}\n"
    assert not (directory / "summary.json").exists()
    done = len(metrics_of(directory))
    assert 2 <= done < epochs

    assert cli(["train", "--resume", str(directory)]) == 0
    assert "going on after" in capsys.readouterr().out
    assert [record["epoch"] for record in metrics_of(directory)] == list(range(1, epochs + 1))
    assert_scalars_are_the_metrics(directory)  # no step is there twice
    assert summary_of(directory)["epochs"] == epochs


@pytest.mark.parametrize("phases", [1, 2])
def test_a_stop_in_the_evaluation_loses_no_training(quick, tmp_path, capsys, monkeypatch, phases):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    sizes = [{"epochs": 1, "batch_size": 35 - 5 * i, "resolution": 28} for i in range(phases)]
    with monkeypatch.context() as patch:
        patch.setattr(start, "evaluate", interrupted)
        assert cli(["train", str(quick(phases=sizes))]) == 130
    assert "Traceback" not in capsys.readouterr().err
    directory = tmp_path / "runs" / "bars"
    before = fastrobust.load(directory).state_dict()
    assert cli(["train", "--resume", str(directory)]) == 0
    after = fastrobust.load(directory).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(metrics_of(directory)) == phases
    assert summary_of(directory)["examples"] == 20


def test_a_run_stopped_before_its_first_checkpoint_starts_again(quick, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        assert cli(["train", str(quick())]) == 130
    directory = tmp_path / "runs" / "bars"
    assert not (directory / run_directory.CHECKPOINT).exists()
    capsys.readouterr()
    assert cli(["train", "--resume", str(directory)]) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert len(metrics_of(directory)) == 2


# ---- import


def test_importing_fastrobust_is_quick():
    code = (
        "import sys, time; a = time.perf_counter(); import torch; b = time.perf_counter(); import fastrobust; "
        "c = time.perf_counter(); print(b - a, c - b, *{m.partition('.')[0] for m in sys.modules})"
    )
    added = []
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        torch_seconds, seconds, *modules = found.stdout.split()
        assert float(torch_seconds) > 0
        added.append(float(seconds))
        assert "fastrobust" in modules
        assert not {"torchvision", "tensorboard", "pydantic"} & set(modules)
    assert statistics.median(added) < 0.5
