"""The commands `fastrobust train` and `fastrobust evaluate`: what they leave, print and return, and how they stop. They are
called in this process where that shows the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from run_files import FILES, assert_scalars_are_the_metrics, metrics_of, summary_of

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
        "precision": "fp32", "arithmetic": "fp32",
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


def test_a_dry_run_shows_the_plan_and_writes_nothing(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastrobust.runtime.half.has_bf16", lambda: False)
    assert cli(["train", str(quick()), "--dry-run", "precision=bf16"]) == 0
    shown = capsys.readouterr()
    assert "70 × 28²" in shown.out and "training about" in shown.out and "nothing was written" in shown.out
    assert "precision bf16 is meant for GPUs" in shown.err
    assert not (tmp_path / "runs").exists()
    assert cli(["train", str(quick()), "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def test_epochs_of_free_that_are_rounded_up_are_told(quick, capsys):
    """It trains whole passes, each of which counts as many epochs as there are replays."""
    made = str(quick(method={"name": "free", "replays": 2}))
    told = "note: phases.0.epochs is 3, and 4 epochs are trained: a pass is 2, one for each replay. Choose a multiple of 2\n"
    for words in (["--dry-run"], []):
        assert cli(["train", made, "phases.0.epochs=3", *words]) == 0
        assert told in capsys.readouterr().out
    assert cli(["train", made, "phases.0.epochs=4", "--dry-run"]) == 0
    assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize(("place", "made"), [("training", False), ("create", False), ("finish", True)])
def test_ctrl_c_says_how_to_go_on(quick, tmp_path, capsys, monkeypatch, place, made):
    """Before the run directory is made there is nothing to resume."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, place, interrupted)
    directory = tmp_path / "runs" / "bars"
    assert cli(["train", str(quick())]) == 130
    nothing = "nothing was saved yet: start again with the same command, without --resume"
    go_on = f"go on with: {to_paste('train', '--resume', directory)}" if made else nothing
    assert capsys.readouterr().err == f"stopped by the keyboard; {go_on}\n"
    assert directory.exists() == made


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
        "examples", "resolution", "norm", "epsilon", "attack", "alpha", "arithmetic",
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
    assert err == f"stopped by {signum.name}; go on with: {to_paste('train', '--resume', directory)}\n"
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
