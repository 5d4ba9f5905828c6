"""What overfitting, divergence and a collapsed loss scale do to a run (the detectors alone: test_guard.py)."""

from __future__ import annotations

import math

import pytest
import torch
from training_runs import SGD, before_step, same, stop_at, weights

from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import Verdicts
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import guard, training


@pytest.fixture
def overfits(monkeypatch):
    """PGD finds all of the guard's images robust at first, and none from the second epoch on; they are called enough. The
    list that is given holds the weights at each call."""
    calls = []

    def made_up(model, images, labels, **settings):
        assert settings["restarts"] == 1
        assert settings["threat"].radius == 0.05
        calls.append({name: t.clone() for name, t in model.state_dict().items()})
        everyone = torch.ones(len(labels), dtype=torch.bool)
        return Verdicts(everyone, everyone if len(calls) == 1 else ~everyone)

    monkeypatch.setattr(guard, "pgd", made_up)
    monkeypatch.setattr(guard, "ENOUGH", 65)
    return calls


def test_the_guard_stops_and_keeps_the_weights_from_before_the_fall(config_of, begin, resume, overfits, capsys):
    job = begin(config_of())
    job.train()
    assert len(overfits) == len(job.history) == 2
    assert not same(overfits[0], overfits[1])
    assert same(weights(job), overfits[0])
    stopped = job.position.stopped
    assert stopped.startswith("stopped after epoch 2: catastrophic overfitting")
    assert "fell from 100.0% to 0.0%" in stopped
    assert "; the weights after epoch 1 are kept. " in stopped and stopped.endswith(f"To train on, {guard.ADVICE}")
    assert stopped in capsys.readouterr().out
    assert [record["guard_accuracy"] for record in job.history] == [1.0, 0.0]
    assert "warning" not in job.history[0] and "fell" in job.history[1]["warning"]

    again = resume(config_of())  # stopped for good
    again.train()
    assert same(weights(again), overfits[0])
    assert again.history == job.history
    assert len(overfits) == 2


def test_the_guard_can_only_warn(config_of, begin, overfits):
    job = begin(config_of(guard={"action": "warn"}))
    job.train()
    assert job.position.stopped is None
    assert len(overfits) == len(job.history) == 3
    assert same(weights(job), overfits[2])
    assert "fell" in job.history[1]["warning"]


def test_a_run_without_any_healthy_epoch_keeps_its_last_weights(config_of, begin, monkeypatch):
    monkeypatch.setattr(guard, "verdict", lambda *given: ("overfit", "made up"))
    job = begin(config_of())
    seen = []
    save = job.save
    job.save = lambda: (seen.append(weights(job)), save())
    job.train()
    said = "stopped after epoch 1: catastrophic overfitting: made up; no epoch with this epsilon was healthy"
    assert job.position.stopped.startswith(said)
    assert len(job.history) == 1
    assert same(weights(job), seen[0])


def test_a_suspicion_is_a_warning_and_training_goes_on(config_of, begin, monkeypatch):
    monkeypatch.setattr(guard, "verdict", lambda history, *given: ("suspect", "made up") if len(history) == 2 else None)
    job = begin(config_of())
    job.train()
    assert job.position.stopped is None
    assert [record.get("warning") for record in job.history] == [None, "suspicious: made up", None]


def test_guarding_changes_nothing_but_what_is_recorded(config_of, begin):
    jobs = {}
    for action in ("stop", "warn", "off"):
        jobs[action] = begin(config_of(guard={"action": action}), action)
        jobs[action].train()
    assert same(weights(jobs["stop"]), weights(jobs["off"]))
    assert same(weights(jobs["warn"]), weights(jobs["off"]))
    assert all("guard_accuracy" in record for record in jobs["warn"].history)
    assert not any("guard_accuracy" in record for record in jobs["off"].history)


def test_few_images_do_not_stop_a_run(config_of, begin, overfits, monkeypatch):
    monkeypatch.setattr(guard, "ENOUGH", 66)
    job = begin(config_of())
    job.train()
    assert job.position.stopped is None and len(job.history) == 3
    assert "suspicious: PGD accuracy on 65 training images fell" in job.history[1]["warning"]


def test_the_guard_attacks_the_same_images_after_every_epoch(config_of, begin, monkeypatch):
    """They are whole and evenly spaced over the training images, whatever the batch size."""
    monkeypatch.setattr(guard, "IMAGES", 30)
    job = begin(config_of(guard={"steps": 3, "alpha": 0.02}, phases__0__epochs=2))
    calls = []

    def watched(model, images, labels, **settings):
        verdicts = pgd(model, images, labels, **settings)
        calls.append((images.clone(), labels.clone(), settings, verdicts))
        return verdicts

    monkeypatch.setattr(guard, "pgd", watched)
    job.train()
    assert len(calls) == 2
    numbers = torch.arange(30) * 65 // 30
    for (images, labels, settings, verdicts), record in zip(calls, job.history, strict=True):
        assert torch.equal(images, job.loader.images[numbers].permute(0, 3, 1, 2))
        assert torch.equal(labels, job.loader.labels[numbers])
        assert settings["threat"] == Threat(0.05)
        assert {key: settings[key] for key in ("alpha", "steps", "restarts")} == {"alpha": 0.02, "steps": 3, "restarts": 1}
        assert (record["guard_images"], record["guard_epsilon"]) == (30, 0.05)
        assert record["guard_accuracy"] == pytest.approx(verdicts.robust.sum().item() / 30)
        assert record["guard_clean_accuracy"] == pytest.approx(verdicts.clean.sum().item() / 30)


def test_what_the_guard_saw_outlasts_an_interruption(config_of, begin, resume, overfits):
    """The fall is noticed by a run that was stopped and resumed between the two epochs."""
    job = begin(config_of())
    stop_at(job, 5)
    with pytest.raises(Interrupted):
        job.train()
    assert len(overfits) == 1 and job.position.stopped is None
    again = resume(config_of())
    again.train()
    assert "fell from 100.0% to 0.0%" in again.position.stopped and same(weights(again), overfits[0])


def test_weights_of_a_smaller_radius_are_not_gone_back_to(config_of, begin, monkeypatch):
    """They may classify well and withstand nothing at the radius that is asked for."""
    monkeypatch.setattr(guard, "verdict", lambda history, *given: ("overfit", "made up") if len(history) == 3 else None)
    job = begin(config_of(epsilon_warmup=3))
    job.train()
    assert "no epoch with this epsilon was healthy" in job.position.stopped and job.good_epoch == 2


def test_during_the_warm_up_the_guard_attacks_with_the_radius_that_training_has_reached(config_of, begin, monkeypatch):
    """Update u of 10 stands at (u + 1/2) / 10 of the training, and so of the warm-up; the guard comes between two."""
    job = begin(config_of(epsilon_warmup=3, guard={"action": "warn"}))
    shares = []

    def watched(*batch, threat, alpha, **settings):
        assert alpha == pytest.approx(threat.radius / 4)
        shares.append(threat.radius / 0.05)
        return pgd(*batch, threat=threat, alpha=alpha, **settings)

    monkeypatch.setattr(guard, "pgd", watched)
    job.train()
    assert len(shares) == 3
    for share, done in zip(shares, (4, 7, 10), strict=True):
        assert (done - 0.5) / 10 - 1e-6 <= share <= (done + 0.5) / 10 + 1e-6


# ---- a loss that is not a number

EXPLODES_IN_EPOCH_2 = {
    "optimizer": {"name": "sgd"},
    "schedule": {"name": "points", "points": [[0, 0.01], [1, 0.01], [1, 1e30], [3, 1e30]]},
}


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_checkpoint(config_of, begin, resume):
    job = begin(config_of(**EXPLODES_IN_EPOCH_2))
    saved = []
    save = job.save
    job.save = lambda: (saved.append(weights(job)), save())
    with pytest.raises(FastrobustError, match=r"epoch 2: training diverged.*checkpoint\.pt, of epoch 1, is the last good"):
        job.train()
    assert len(saved) == 1
    kept = resume(config_of(**EXPLODES_IN_EPOCH_2))
    assert same(weights(kept), saved[0])
    assert all(t.isfinite().all() for t in weights(kept).values())
    assert len(kept.history) == 1


def test_a_loss_that_is_not_a_number_in_the_first_epoch(config_of, begin):
    job = begin(config_of(**SGD | {"schedule": {"name": "multistep", "lr": 1e30}}))
    with pytest.raises(FastrobustError, match=r"epoch 1: training diverged.*there is no earlier checkpoint"):
        job.train()
    assert not (job.directory / run_directory.CHECKPOINT).exists()


def test_a_signal_does_not_save_weights_that_are_not_numbers(config_of, begin):
    job = begin(config_of(**EXPLODES_IN_EPOCH_2))
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    assert not all(t.isfinite().all() for t in weights(job).values())
    tensors, facts = run_directory.load_checkpoint(job.directory)
    assert facts["position"]["step"] == 4
    assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("learner.model."))


def test_weights_spoilt_by_the_last_update_of_an_epoch_are_not_saved_as_good(config_of, begin, resume):
    """The loss of an update is taken before it: a whole epoch of finite losses can end with weights that are not numbers.
    It is divergence, and not called catastrophic overfitting, although PGD finds nothing robust any more."""
    job = begin(config_of(guard={"action": "stop"}))

    def spoil():
        update = job.learner.update

        def once(*batch):
            update(*batch)
            job.learner.model.network[0].weight.data.fill_(math.nan)

        job.learner.update = once

    before_step(job, 7, spoil)
    with pytest.raises(FastrobustError) as caught:
        job.train()
    assert "epoch 2: training diverged: weights or optimiser hold infinite numbers or NaN" in str(caught.value)
    assert f"{job.directory / run_directory.CHECKPOINT}, of epoch 1, is the last good checkpoint" in str(caught.value)
    assert "overfitting" not in str(caught.value)
    kept = resume(config_of(guard={"action": "stop"}))
    assert len(kept.history) == 1
    assert all(t.isfinite().all() for t in weights(kept).values())


def test_a_collapse_of_fp16s_loss_scale_is_told_apart(config_of, begin):
    """Every update overflows: the weights stay as they are, nothing is learnt, and before this check the run went on."""
    job = begin(config_of(precision="fp16", phases=[{"epochs": 2, "batch_size": 2, "resolution": 28}]))
    with torch.no_grad():
        job.learner.model.network[0].weight.fill_(1e30)  # the activations overflow in fp16
    before = weights(job)
    with pytest.raises(FastrobustError, match=r"epoch 1: fp16's loss scale collapsed.*bf16 or fp32.*no earlier checkpoint"):
        job.train()
    assert same(weights(job), before)


def test_a_skipped_update_of_fp16_is_no_collapse(config_of, begin):
    job = begin(config_of(precision="fp16", data__limit=20, phases=[{"epochs": 2, "batch_size": 5, "resolution": 28}]))
    before_step(job, 2, lambda: job.learner.scaler.update(new_scale=2.0**18))  # the next gradients overflow
    job.train()
    assert len(job.history) == 2
    assert job.learner.scaler.get_scale() < 2.0**18


def test_a_divergence_within_a_long_epoch_is_found_there(config_of, begin, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    job = begin(config_of(**EXPLODES_IN_EPOCH_2))
    with pytest.raises(FastrobustError, match="epoch 2: training diverged"):
        job.train()
    assert job.position.step < 7
