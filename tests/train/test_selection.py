"""Held-out selection: against the weights of all epochs, attacked afterwards."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import CPU, assert_same_end, same, stop_at, weights

from fastrobust.__main__ import main as cli
from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.config import reading
from fastrobust.data import loaders
from fastrobust.evaluation.trained import open_trained
from fastrobust.runtime import run_directory
from fastrobust.runtime.distributed import ALONE
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import guard, start

SELECTED = {
    "data__path": None,
    "data__limit": 120,
    "data__held_out": 40,
    "selection": {"steps": 4, "alpha": 0.02},
    "averaging": {"decay": 0.9},
    "phases": [{"epochs": 4, "batch_size": 30, "resolution": 28}],
    "schedule__max_lr": 0.02,
}


@pytest.fixture
def selecting(bars, config_of):
    def make(**changes):
        merged = SELECTED | {"data__path": str(bars)} | changes
        return config_of(**{key: value for key, value in merged.items() if value is not None})

    return make


def each_epoch(job) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The live and the averaged weights after every epoch, filled in while the job is trained."""
    seen, save = [], job.save

    def noted():
        if len(seen) < len(job.history):
            live = weights(job)
            averaged = {} if job.learner.average is None else job.learner.average.tensors
            seen.append({"live": live, "averaged": live | {name: t.clone() for name, t in averaged.items()}})
        save()

    job.save = noted
    return seen


def test_the_best_of_all_weights_on_the_held_out_images_is_kept(selecting, begin):
    job = begin(selecting())
    seen = each_epoch(job)
    job.train()
    images = loaders.still(job.config, "held_out", None)
    assert len(images.names) == 40 and not set(job.loader.names) & set(images.names)
    found = {}
    for epoch, kinds in enumerate(seen, 1):
        for kind, state in kinds.items():
            model = copy.deepcopy(job.learner.model)
            model.load_state_dict(state)
            settings = {"threat": Threat(0.05), "alpha": 0.02, "steps": 4, "restarts": 1}
            verdicts = pgd(model, images.images, images.labels, **settings)
            found[epoch, kind] = verdicts.robust.double().mean().item(), verdicts.clean.double().mean().item()
    assert len(found) == 8 and len(set(found.values())) > 3
    for record in job.history:
        for kind, name in (("live", "held_out"), ("averaged", "averaged_held_out")):
            told = record[f"{name}_accuracy"], record[f"{name}_clean_accuracy"]
            assert told == found[record["epoch"], kind]
    best = max(found.values())
    first = next(key for key, value in found.items() if value == best)
    assert job.selected == dict(zip(("epoch", "weights"), first, strict=True)) | {
        "robust_accuracy": best[0],
        "clean_accuracy": best[1],
    }
    assert same(job.best, seen[first[0] - 1][first[1]])


def test_selection_changes_nothing_in_the_training(selecting, begin):
    with_it = begin(selecting(), "with")
    with_it.train()
    without = begin(selecting(selection=None), "without")
    without.train()
    assert same(weights(with_it), weights(without))
    a, b = with_it.learner.average.tensors, without.learner.average.tensors
    assert same(a, b) and without.selected is None and not without.best


@pytest.mark.parametrize("at", [2, 15])
def test_it_resumes_to_the_same_bits(at, selecting, begin, resume):
    """The last epoch's learning rate spoils the weights: the best ones are older than the second interruption."""
    rates = {"name": "points", "points": [[0, 0.005], [3, 0.005], [3.2, 0.5], [4, 0.5]]}
    config = selecting(schedule=rates, schedule__max_lr=None, guard={"action": "off"})
    whole = begin(config, "whole")
    whole.train()
    assert whole.selected["epoch"] < 4
    stopped = begin(config)
    stop_at(stopped, at)
    with pytest.raises(Interrupted):
        stopped.train()
    again = resume(config)
    again.train()
    assert_same_end(again, whole)
    assert same(again.best, whole.best)


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4]), (3, [3, 4]), (9, [4])])
def test_every_so_many_epochs_and_after_the_last(every, epochs, selecting, begin):
    job = begin(selecting(selection={"steps": 1, "every": every}))
    job.train()
    assert [record["epoch"] for record in job.history if "held_out_accuracy" in record] == epochs
    assert job.config.selection.alpha == 0.05 / 4


def test_the_radius_is_the_whole_one_while_epsilon_warms_up(selecting, begin, monkeypatch):
    job, seen, real = begin(selecting(epsilon_warmup=4, guard={"action": "off"})), [], guard.look
    monkeypatch.setattr(guard, "look", lambda *given: seen.append(float(given[3].radius)) or real(*given))
    job.train()
    assert seen == [0.05] * 8


def test_a_run_that_the_guard_stops_ends_with_the_selected_weights(selecting, monkeypatch, tmp_path):
    monkeypatch.setattr(guard, "verdict", lambda history, *given: ("overfit", "made up") if len(history) == 2 else None)
    config = selecting(averaging=None)
    summary = start.run(config, tmp_path / "bars", CPU, ALONE)
    assert "the weights that did best on the held-out images are kept" in summary["stopped"]
    records = [json.loads(line) for line in (tmp_path / "bars" / "metrics.jsonl").read_text().splitlines()]
    best = max(record["held_out_accuracy"] for record in records)
    assert summary["selection"]["robust_accuracy"] == best and summary["weights"] == "live"
    assert summary["weights_sha256"] == open_trained(tmp_path / "bars").digest


def test_what_a_run_says_and_writes(bars, config_file, tmp_path, capsys):
    file = config_file(tmp_path, **(SELECTED | {"data__path": str(bars)}))
    assert cli(["train", str(file), "--dry-run"]) == 0
    assert "40 held-out images, 8 times" in capsys.readouterr().out
    assert cli(["train", str(file)]) == 0
    run, out = tmp_path / "runs" / "bars", capsys.readouterr().out
    summary, (tensors, facts) = json.loads((run / "summary.json").read_text()), run_directory.load_checkpoint(run)
    chosen, held = facts["selected"], loaders.still(reading.load(run / "config.yaml"), "held_out", None)
    assert summary["selection"] == chosen | {
        "attack": "pgd-4-1",
        "epsilon": 0.05,
        "alpha": 0.02,
        "images": 40,
        "held_out_images": held.checksum(),
    }
    assert summary["weights"] == chosen["weights"] and "evaluations_of_live_weights" not in summary
    stored = load_file(run / "model.safetensors")
    assert all(torch.equal(t, tensors[f"best.{name}"]) for name, t in stored.items())
    assert not (run / "model.live.safetensors").exists()
    assert "held out: 40 training images, on which the weights are selected" in out
    lines = [line for line in out.splitlines() if line.startswith("     held out  PGD ")]
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    kind = "averaged weights" if chosen["weights"] == "averaged" else "weights"
    accuracy = f"{chosen['robust_accuracy']:.2%} under pgd-4-1 on 40 held-out images"
    assert f"selected: the {kind} after epoch {chosen['epoch']}, {accuracy}" in out


def test_it_needs_held_out_images_that_are_not_the_test_images(selecting, begin, tmp_path, bars):
    with pytest.raises(ConfigError, match=r"set data\.held_out, such as to 1000"):
        selecting(data__held_out=0)
    with pytest.raises(ConfigError, match="are this run's test images, and weights are not chosen on those"):
        shutil.copytree(bars / "train", tmp_path / "alone" / "train")
        begin(selecting(data__path=str(tmp_path / "alone")))
