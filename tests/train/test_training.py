"""Tests of fastrobust.train.training: epochs and batches, seeds, precision, memory, clocks, the summary. What the
guard and divergence do to a run is in test_training_guard.py, stopping and resuming in test_checkpoint.py."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from training_runs import (
    CPU,
    METHODS,
    assert_same_end,
    before_step,
    same,
    stop_at,
    weights,
    without_times,
)

from fastrobust.runtime import distributed
from fastrobust.runtime.errors import ConfigError, FastrobustError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import training

# ---- the plan: epochs, updates, batches


@pytest.mark.parametrize(
    "examples, batch_size, epochs", [(65, 20, 3), (60, 20, 2), (61, 20, 3), (59, 20, 1), (30, 30, 2), (31, 30, 2)]
)
def test_odd_images_open_the_next_epochs_batches(config_of, begin, examples, batch_size, epochs):
    """After pass k, ceil(k n / B) full batches have been seen, and each image k times, or once more."""
    phases = [{"epochs": epochs, "batch_size": batch_size, "resolution": 28}]
    job = begin(config_of(data__limit=examples, phases=phases, method={"name": "standard"}))
    seen, sizes = Counter(), []
    take = job.step.take

    def watched(batch):
        sizes.append(len(batch.images))
        seen.update(image.numpy().tobytes() for image in batch.images)
        take(batch)

    job.step.take = watched
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
    take = job.step.take
    job.step.take = lambda batch: (labels.append(batch.labels.clone()), take(batch))
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


# ---- memory


class Hungry:
    """A training step that needs more memory than there is for more than `fits` images."""

    def __init__(self, job, fits):
        self.take, self.fits, self.tried = job.step.take, fits, []

    def __call__(self, batch):
        self.tried.append(len(batch.images))
        if len(batch.images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.take(batch)


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
        | {"resolution": 28, "norm": "linf"}
        for e in (0.1, 0.2)
    ]
    job.position.stopped = "early"
    found = training.summarize(job, evaluations)
    seconds = sum(record["seconds"] for record in job.history)
    expected = {
        "name": "bars", "method": "fgsm", "dataset": "image_folder", "model": "mnist_net", "epsilon": 0.1,
        "robust_accuracy": 0.5, "training_epsilon": 0.05, "epochs": 3, "stopped": "early", "seed": 0, "precision": "fp32",
        "versions": {"torch": "x"}, "evaluations": evaluations,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["train_seconds"] == pytest.approx(seconds)
    assert found["seconds_per_epoch"] == pytest.approx(seconds / 3)
