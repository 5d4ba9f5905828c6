"""Tests of fastrobust.trainer: epochs and batches, seeds, precision, the guard, divergence, memory, the summary. Stopping
going on are in test_checkpoint.py."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from trainer_runs import (
    CPU,
    METHODS,
    SGD,
    assert_same_end,
    before_step,
    same,
    stop_at,
    weights,
    without_times,
)

from fastrobust.attack import pgd
from fastrobust.attack.pgd import pgd
from fastrobust.attack.verdicts import Verdicts
from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.errors import ConfigError, FastrobustError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import guard, trainer
from fastrobust.train.training import summarize

# ---- the plan: epochs, updates, batches


@pytest.mark.parametrize(
    "examples, batch_size, epochs", [(65, 20, 3), (60, 20, 2), (61, 20, 3), (59, 20, 1), (30, 30, 2), (31, 30, 2)]
)
def test_odd_images_open_the_next_epochs_batches(config_of, begin, examples, batch_size, epochs):
    """After pass k, ceil(k n / B) full batches have been seen, and each image k times, or once more."""
    phases = [{"epochs": epochs, "batch_size": batch_size, "resolution": 28}]
    job = begin(config_of(data__limit=examples, phases=phases, method={"name": "standard"}))
    seen, sizes = Counter(), []
    step = job.step.take

    def train_step(images, labels):
        sizes.append(len(images))
        seen.update(image.numpy().tobytes() for image in images)
        step(images, labels)

    job.step.take = train_step
    job.train()
    expected = [math.ceil(k * examples / batch_size) for k in range(1, epochs + 1)]
    assert [record["updates"] for record in job.history] == expected
    assert sizes == [batch_size] * expected[-1]
    assert len(job.learner.lr_table) == expected[-1]
    assert len(seen) == examples
    assert set(seen.values()) <= {epochs, epochs + 1}


@pytest.mark.parametrize("epochs, passes, marks", [(4, 2, [2, 4]), (5, 3, [2, 4, 5])])
def test_replays_count_as_epochs_and_update_the_weights(config_of, begin, epochs, passes, marks):
    config = config_of(method={"name": "free", "replays": 2}, phases__0__epochs=epochs)
    assert config.passes(config.phases[0]) == passes
    job = begin(config)
    job.train()
    batches = [math.ceil(k * 65 / 20) for k in range(1, passes + 1)]
    assert [record["updates"] for record in job.history] == [2 * n for n in batches]
    assert [record["epoch"] for record in job.history] == marks
    assert len(job.learner.lr_table) == 2 * batches[-1]


def test_the_learning_rate_is_that_of_each_updates_middle(config_of, begin):
    job = begin(config_of(data__limit=40, schedule={"name": "cyclic", "max_lr": 0.01, "peak": 0.5}, phases__0__epochs=2))
    used = []
    update = job.learner.update
    job.learner.update = lambda *batch: (update(*batch), used.append(job.learner.lr.item()))
    job.train()
    assert used == pytest.approx([0.0025, 0.0075, 0.0075, 0.0025])
    assert [record["learning_rate"] for record in job.history] == pytest.approx([0.0075, 0.0025])


def test_metrics_are_those_of_the_epoch(config_of, begin):
    """Against sums kept beside the learner's own."""
    job = begin(config_of(method={"name": "standard"}, guard={"action": "off"}))
    seen = []
    forward = job.learner.forward

    def watched(x):
        logits = forward(x)
        seen.append(logits.detach().clone())
        return logits

    job.learner.forward = watched
    labels = []
    step = job.step.take
    job.step.take = lambda images, y: (labels.append(y.clone()), step(images, y))
    job.train()
    for record, first, last in zip(job.history, (0, 4, 7), (4, 7, 10), strict=True):
        logits, y = torch.cat(seen[first:last]), torch.cat(labels[first:last])
        assert record["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
        assert record["train_accuracy"] == (logits.argmax(1) == y).double().mean().item()
        assert record["images_per_second"] == pytest.approx(len(y) / record["seconds"])
    assert sum(record["seconds"] for record in job.history) == pytest.approx(job.position.train_seconds)


def test_a_batch_larger_than_the_data_is_refused(config_of, begin):
    with pytest.raises(ConfigError, match=r"phases\.0\.batch_size is 66, but there are only 65 images"):
        begin(config_of(phases=[{"epochs": 1, "batch_size": 66, "resolution": 28}]))


def test_an_absent_gpu_is_refused():
    assert distributed.pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match="cuda:99 is not there"):
        distributed.pick_device("cuda:99")


# ---- seeds and precision


@pytest.mark.parametrize("method", ["standard", "fgsm random"])
def test_a_seed_reproduces_a_run_and_another_seed_does_not(config_of, begin, method):
    def trained(name, seed):
        job = begin(config_of(seed=seed, phases__0__epochs=1, **METHODS[method]), name)
        first = weights(job)
        job.train()
        return first, weights(job), without_times(job.history)

    torch.manual_seed(1)
    a = trained("a", 5)
    torch.manual_seed(2)
    torch.rand(100)
    c, d = trained("c", 5), trained("d", 6)
    assert same(a[0], c[0])
    assert same(a[1], c[1])
    assert a[2] == c[2]
    assert not torch.equal(a[0]["network.0.weight"], d[0]["network.0.weight"])
    assert not same(a[1], d[1])


@pytest.mark.parametrize("model", ["mnist_net", "preact_resnet18_w16"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(config_of, begin, resume, precision, model):
    changes = {"model__name": model, "data__limit": 20, "phases": [{"epochs": 2, "batch_size": 10, "resolution": 28}]}
    if model != "mnist_net":
        changes["phases"][0]["resolution"] = 8
    full = begin(config_of(**changes), "full")
    full.train()
    config = config_of(precision=precision, **changes)
    reference = begin(config, "reference")
    reference.train()
    for name, t in weights(reference).items():
        assert t.dtype in (torch.float32, torch.int64), name
        assert t.isfinite().all(), name
    assert not same(weights(reference), weights(full))  # the precision was used
    assert reference.history[0]["loss"] == pytest.approx(full.history[0]["loss"], rel=0.05)
    job = begin(config)
    stop_at(job, 3)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config)
    job.train()
    assert_same_end(job, reference)


# ---- the guard


@pytest.fixture
def overfits(monkeypatch):
    """PGD finds all of the minibatch robust at first, and none of it from the second epoch on. The list that is given
    holds the weights at each call."""
    calls = []

    def pgd(model, images, labels, **settings):
        assert settings["restarts"] == 1
        assert settings["epsilon"] == 0.05
        calls.append({name: t.clone() for name, t in model.state_dict().items()})
        everyone = torch.ones(len(labels), dtype=torch.bool)
        return Verdicts(everyone, everyone if len(calls) == 1 else ~everyone)

    monkeypatch.setattr(pgd, "pgd", pgd)
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
    assert stopped.endswith("the weights after epoch 1 are kept")
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
    monkeypatch.setattr(guard, "verdict", lambda history, drop: ("overfit", "made up"))
    job = begin(config_of())
    seen = []
    save = job.save
    job.save = lambda: (seen.append(weights(job)), save())
    job.train()
    assert job.position.stopped == "stopped after epoch 1: catastrophic overfitting: made up; no epoch was healthy"
    assert len(job.history) == 1
    assert same(weights(job), seen[0])


def test_a_suspicion_is_a_warning_and_training_goes_on(config_of, begin, monkeypatch):
    monkeypatch.setattr(guard, "verdict", lambda history, drop: ("suspect", "made up") if len(history) == 2 else None)
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


def test_the_guard_attacks_the_last_minibatch_with_its_settings(config_of, begin, monkeypatch):
    job = begin(config_of(guard={"steps": 3, "alpha": 0.02}, phases__0__epochs=2))
    batches, calls = [], []
    step, pgd = job.step.take, pgd
    job.step.take = lambda *batch: (batches.append(batch), step(*batch))

    def watched(model, images, labels, **settings):
        verdicts = pgd(model, images, labels, **settings)
        calls.append((images.clone(), labels.clone(), settings, verdicts))
        return verdicts

    monkeypatch.setattr(pgd, "pgd", watched)
    job.train()
    assert len(calls) == 2
    for (images, labels, settings, verdicts), last, record in zip(calls, (3, 6), job.history, strict=True):
        assert torch.equal(images, batches[last][0]) and torch.equal(labels, batches[last][1])
        assert {key: settings[key] for key in ("epsilon", "alpha", "steps", "restarts")} == {
            "epsilon": 0.05, "alpha": 0.02, "steps": 3, "restarts": 1,
        }  # fmt: skip
        assert record["guard_accuracy"] == pytest.approx(verdicts.robust.sum().item() / 20)
        assert record["guard_clean_accuracy"] == pytest.approx(verdicts.clean.sum().item() / 20)


def test_during_the_warm_up_the_guard_attacks_with_the_radius_that_training_has_reached(config_of, begin, monkeypatch):
    """Update u of 10 stands at (u + 1/2) / 10 of the training, and so of the warm-up; the guard comes between two."""
    job = begin(config_of(epsilon_warmup=3, guard={"action": "warn"}))
    shares, pgd = [], pgd

    def watched(*batch, epsilon, alpha, **settings):
        assert alpha == pytest.approx(epsilon / 4)
        shares.append(epsilon / 0.05)
        return pgd(*batch, epsilon=epsilon, alpha=alpha, **settings)

    monkeypatch.setattr(pgd, "pgd", watched)
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
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    job = begin(config_of(**EXPLODES_IN_EPOCH_2))
    with pytest.raises(FastrobustError, match="epoch 2: training diverged"):
        job.train()
    assert job.position.step < 7


# ---- memory


class Hungry:
    """A training step that needs more memory than there is for more than `fits` images."""

    def __init__(self, job, fits):
        self.step, self.fits, self.tried = job.step.take, fits, []

    def __call__(self, images, labels):
        self.tried.append(len(images))
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.step(images, labels)


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_names_a_batch_size_that_was_tried(config_of, begin, method):
    job = begin(config_of(**METHODS[method]))
    job.step.take = hungry = Hungry(job, 7)
    with pytest.raises(FastrobustError, match=r"with 20 images at once; 5 was tried and fits: set phases\.0\.batch_size=5"):
        job.train()
    assert hungry.tried == [20, 10, 5, 5]


def test_out_of_memory_for_every_batch_size(config_of, begin):
    job = begin(config_of())
    job.step.take = hungry = Hungry(job, 0)
    with pytest.raises(FastrobustError, match=r"not even 1 fits .*: use a smaller model"):
        job.train()
    assert hungry.tried == [20, 10, 5, 2, 1]


def test_another_error_of_a_step_is_no_lack_of_memory(config_of, begin):
    job = begin(config_of())
    before_step(job, 2, lambda: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        job.train()


# ---- clocks, determinism


@pytest.mark.parametrize("leap", [-3.2e8, 3.2e8], ids=["ten years back", "ten years ahead"])
def test_a_clock_that_is_set_changes_nothing(config_of, begin, resume, monkeypatch, leap):
    reference = begin(config_of(), "reference")
    reference.train()
    job = begin(config_of())
    now = time.time
    before_step(job, 3, lambda: monkeypatch.setattr(time, "time", lambda: now() + leap))
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config_of())
    job.train()
    assert_same_end(job, reference)
    assert all(record["seconds"] >= 0 for record in job.history)
    assert len(list(job.directory.glob("events.out.tfevents.*"))) == 1  # there is no order to get wrong


def test_deterministic_is_set_while_its_run_trains(config_of, begin):
    seen = []
    for deterministic in (True, False):
        job = begin(config_of(deterministic=deterministic, phases__0__epochs=1), str(deterministic))
        before_step(job, 1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
        job.train()
    assert seen == [True, False]


# ---- the summary


def test_the_summary_says_what_was_run(config_of, begin):
    job = begin(config_of())
    job.train()
    (job.directory / "environment.json").write_text('{"versions": {"torch": "x"}, "hardware": {}, "commit": null}')
    evaluations = [
        {"clean_accuracy": 0.9, "robust_accuracy": 0.5, "attack": "pgd-2-1", "epsilon": e, "alpha": 0.1, "examples": 7}
        | {"resolution": 28}
        for e in (0.1, 0.2)
    ]
    facts = {"history": job.history, "position": job.position | {"stopped": "early"}}
    found = summarize(job.config, job.directory, facts, evaluations)
    seconds = sum(record["seconds"] for record in job.history)
    expected = {
        "name": "bars", "method": "fgsm", "dataset": "image_folder", "model": "mnist_net", "epsilon": 0.1,
        "robust_accuracy": 0.5, "training_epsilon": 0.05, "epochs": 3, "stopped": "early", "seed": 0, "precision": "fp32",
        "versions": {"torch": "x"}, "evaluations": evaluations,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["train_seconds"] == pytest.approx(seconds)
    assert found["seconds_per_epoch"] == pytest.approx(seconds / 3)
