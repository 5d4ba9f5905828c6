"""Tests of fastrobust.train.checkpoint, of stopping and resuming: what was interrupted and resumed must end with the same
bits as a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from PIL import Image
from training_runs import (
    METHODS,
    NEWER,
    SGD,
    TWO_PHASES,
    assert_same_end,
    before_step,
    crash,
    same,
    stop_at,
    weights,
)

from fastrobust.config import reading
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import training
from fastrobust.train.methods.fgsm import Fgsm

# ---- resuming


@pytest.mark.parametrize(
    ("method", "optimizer"), [*((m, o) for m in METHODS for o in ("adam", "sgd")), *((m, "sgd") for m in NEWER)]
)
def test_an_interrupted_run_ends_with_the_same_bits(config_of, begin, resume, method, optimizer):
    changes = METHODS[method] if method in METHODS else {"method": NEWER[method], "guard": {"action": "off"}}
    config = config_of(**changes, **(SGD if optimizer == "sgd" else {}))
    reference = begin(config, "reference")
    first = weights(reference)
    reference.train()
    assert reference.position.stopped is None
    assert len(reference.history) == 3
    assert not same(weights(reference), first)

    job = begin(config, "middle of epoch 2")
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    assert job.position.step == 6
    job = resume(config, "middle of epoch 2")
    assert job.learner.updates.item() == 6 * config.replays
    job.train()
    assert_same_end(job, reference)

    job = begin(config, "end of epoch 1")
    before_step(job, 5, crash)
    with pytest.raises(ZeroDivisionError):
        job.train()
    job = resume(config, "end of epoch 1")
    assert job.position.step == 4
    job.train()
    assert_same_end(job, reference)


def test_a_run_with_half_precision_weights_ends_with_the_same_bits(config_of, begin, resume):
    """The checkpoint holds the fp32 weights, and the half-precision ones are made of them."""
    config = config_of(engine="fused", precision="bf16", **SGD)
    reference = begin(config, "reference")
    reference.train()
    assert reference.learner.shadow is not None
    job = begin(config)
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config)
    job.train()
    assert_same_end(job, reference)
    assert all(t.dtype == torch.float32 for t in weights(job).values() if t.is_floating_point())


@pytest.mark.parametrize("at", [4, 10], ids=["epoch 1", "the run"])
@pytest.mark.parametrize("method", ["standard", "fgsm random"])
def test_a_signal_in_the_last_step_of(config_of, begin, resume, method, at):
    """The epoch's bookkeeping (metrics, the guard) is still to be done when the run goes on."""
    config = config_of(**METHODS[method])
    reference = begin(config, "reference")
    reference.train()
    job = begin(config)
    stop_at(job, at)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config)
    job.train()
    assert_same_end(job, reference)


def test_a_run_can_be_interrupted_again_and_again(config_of, begin, resume):
    config = config_of(**METHODS["fgsm previous"])
    reference = begin(config, "reference")
    reference.train()
    job, stops = begin(config), 0
    while True:
        stop_at(job, 3)
        try:
            job.train()
            break
        except Interrupted:
            stops += 1
            job = resume(config)
    assert stops == 3
    assert_same_end(job, reference)


def test_phases_differ_in_resolution_and_batch_size_and_can_be_resumed(config_of, begin, resume, monkeypatch):
    config = config_of(**TWO_PHASES)
    reference = begin(config, "reference")
    shapes, step = [], Fgsm.step

    def watched(self, learner, batch, *rest):
        shapes.append(tuple(batch.x.shape))
        step(self, learner, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Fgsm, "step", watched)
        reference.train()
    assert shapes == [(10, 3, 8, 8)] * 5 + [(7, 3, 12, 12)] * 8
    marks = [(record["epoch"], record["phase"], record["updates"]) for record in reference.history]
    assert marks == [(1, 0, 3), (2, 0, 5), (3, 1, 9), (4, 1, 13)]

    for at, stands in {2: (0, 2), 6: (1, 1), 8: (1, 3)}.items():
        job = begin(config, f"stopped in step {at}")
        stop_at(job, at)
        with pytest.raises(Interrupted):
            job.train()
        job = resume(config, job.directory.name)
        assert (job.position.phase, job.position.step) == stands
        job.train()
        assert_same_end(job, reference)

    job = begin(config, "crashed between the phases")
    before_step(job, 6, crash)
    with pytest.raises(ZeroDivisionError):
        job.train()
    job = resume(config, job.directory.name)
    assert (job.position.phase, job.position.step) == (1, 0)
    job.train()
    assert_same_end(job, reference)


@pytest.mark.parametrize("method", ["class_uap", "liet", "fgsm_pgi", "rs_cs", "sora"])
def test_what_all_processes_agree_on_is_kept_from_phase_to_phase(config_of, begin, resume, method):
    """As long as it fits: the batch may be another, the images' size not. The same bits after an interruption."""
    phases = [{"epochs": 1, "batch_size": size, "resolution": 28} for size in (20, 13)]
    config = config_of(method=NEWER[method], phases=phases, **SGD)
    reference, states = begin(config, "reference"), []
    enter = reference.step.enter_phase

    def watched(*arguments):
        for act in (lambda: None, lambda: enter(*arguments)):
            act()
            states.append({name: t.clone() for name, t in reference.step.state.items()})

    reference.step.enter_phase = watched
    reference.train()
    before, after = states
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    job = begin(config)
    stop_at(job, 7)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config)
    assert (job.position.phase, job.position.step) == (1, 3)
    job.train()
    assert_same_end(job, reference)
    reference.step.enter_phase(13, 3, 14)
    assert all(t.shape[-1] == 14 for t in reference.step.state.values() if t.dim() == 4)


@pytest.mark.parametrize("changes", [{}, TWO_PHASES], ids=["one phase", "two phases"])
def test_a_trained_run_can_be_resumed_for_its_evaluation(config_of, begin, resume, changes):
    """As after a stop during the evaluation: nothing is left to train."""
    config = config_of(**changes)
    reference = begin(config)
    reference.train()
    job = resume(config)
    job.train()
    assert same(weights(job), weights(reference))
    assert job.history == reference.history


def test_resuming_with_fewer_images_is_refused(config_of, begin, few_bars, tmp_path):
    data = shutil.copytree(few_bars, tmp_path / "data")
    config = config_of(data__path=str(data), data__limit=500, phases__0__epochs=1)
    job = begin(config, "a")
    job.train()
    min((data / "train").glob("*/*.png")).unlink()
    with pytest.raises(RunError, match=f"begun on 70 images, but there are 69 now in {data}"):
        begin(config, "b").restore(*run_directory.load_checkpoint(job.directory))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__name": "preact_resnet18_w16"}, "model.name: mnist_net then, preact_resnet18_w16 now"),
        (SGD, "optimizer.name: adam then, sgd now"),
        ({"epsilon": 0.1}, "epsilon: 0.05 then, 0.1 now"),
        ({"seed": 3}, "seed: 0 then, 3 now"),
    ],
)
def test_a_config_edited_after_the_checkpoint_is_refused(config_of, begin, changes, message):
    job = begin(config_of(phases__0__epochs=1), "a")
    job.train()
    other = begin(config_of(phases__0__epochs=1, **changes), "b")
    with pytest.raises(RunError, match=f"(?s)was changed since its checkpoint was written.*{message}.*Put it back"):
        other.restore(*run_directory.load_checkpoint(job.directory))


def test_what_does_not_touch_training_may_be_edited(config_of, begin, few_bars, tmp_path):
    """Files and data that were moved, another device of the kind, another evaluation."""
    job = begin(config_of(phases__0__epochs=1), "a")
    job.train()
    made = config_of(phases__0__epochs=1).to_dict() | {"name": "other", "output": "elsewhere"}
    made["data"]["path"] = str(shutil.copytree(few_bars, tmp_path / "moved"))
    made["evaluation"] |= {"steps": 3, "batch_size": 7}
    other = begin(reading.parse(made, "test"), "b")
    other.restore(*run_directory.load_checkpoint(job.directory))
    assert same(weights(other), weights(job))


@pytest.mark.parametrize("change", ["a pixel", "a label"])
def test_replaced_data_are_refused(config_of, begin, few_bars, tmp_path, change):
    """As many images as before, but not the same."""
    data = shutil.copytree(few_bars, tmp_path / "data")
    job = begin(config_of(data__path=str(data), phases__0__epochs=1), "a")
    job.train()
    one = min((data / "train").glob("*/*.png"))
    if change == "a pixel":
        with Image.open(one) as image:
            image.putpixel((3, 4), (1, 2, 3))
            image.save(one)
    else:
        (data / "train" / "bar9" / "9999.png").write_bytes(one.read_bytes())
        one.unlink()
    again = begin(config_of(data__path=str(data), phases__0__epochs=1), "b")
    before = {file: file.read_bytes() for file in job.directory.iterdir()}
    with pytest.raises(RunError, match=f"in {data} are not those that the run was begun on"):
        again.restore(*run_directory.load_checkpoint(job.directory))
    assert {file: file.read_bytes() for file in job.directory.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda f, t: f.pop("position"),
        lambda f, t: f["position"].pop("step"),
        lambda f, t: f["position"].update(step="3"),
        lambda f, t: f["position"].update(phase=None),
        lambda f, t: f["position"].update(phase=7),
        lambda f, t: f["position"].update(step=-1),
        lambda f, t: f.update(history=5),
        lambda f, t: t.pop("state.delta"),
        lambda f, t: t.update({"state.delta": torch.zeros(1)}),
        lambda f, t: t.pop("rng.cpu"),
        lambda f, t: t.update({"rng.cpu": torch.zeros(3)}),
        lambda f, t: t.update({"learner.sums.updates": torch.zeros(2)}),
    ],
)
def test_a_checkpoint_that_fits_its_checksum_but_makes_no_sense_is_refused(config_of, begin, change):
    config = config_of(phases__0__epochs=1, **METHODS["fgsm previous"])
    job = begin(config, "a")
    job.train()
    tensors, facts = run_directory.load_checkpoint(job.directory)
    change(facts, tensors)
    with pytest.raises(RunError, match="does not fit its config"):
        begin(config, "b").restore(tensors, facts)


# ---- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_and_says_how_to_go_on(config_of, begin, signum):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    job = begin(config_of())
    before_step(job, 2, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match=f"{signum.name}.*--resume {job.directory}$") as caught:
        job.train()
    assert caught.value.signum == signum
    assert job.position.step == 2
    assert run_directory.load_checkpoint(job.directory)[1]["position"]["step"] == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_stops_at_once(config_of, begin):
    before = signal.getsignal(signal.SIGINT)
    job = begin(config_of())
    before_step(job, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        job.train()
    assert signal.getsignal(signal.SIGINT) is before


def test_training_gives_the_signals_back(config_of, begin):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    begin(config_of(phases__0__epochs=1)).train()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# ---- checkpoints within an epoch


def test_a_long_epoch_is_saved_in_its_middle(config_of, begin, resume, monkeypatch):
    reference = begin(config_of(), "reference")
    reference.train()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    job = begin(config_of())
    before_step(job, 7, crash)
    with pytest.raises(ZeroDivisionError):
        job.train()
    job = resume(config_of())
    assert job.position.step == 6
    job.train()
    assert_same_end(job, reference)


# ---- written beside the training


def test_a_checkpoint_is_of_its_moment_however_long_it_takes(config_of, begin, monkeypatch):
    """Training goes on while the first is written: two more steps are taken before its tensors are read."""
    written, stepped, save = {"reference": [], "run": []}, threading.Event(), run_directory.save_checkpoint

    def slow(directory, tensors, facts):
        if directory.name == "run" and not written["run"]:
            assert stepped.wait(60)
        written[directory.name].append(({name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(facts))))
        save(directory, tensors, facts)

    monkeypatch.setattr(run_directory, "save_checkpoint", slow)
    reference = begin(config_of(), "reference")
    reference.train()
    job = begin(config_of())
    before_step(job, 6, stepped.set)  # the first is of 4 steps
    job.train()
    for (tensors, facts), (expected, expected_facts) in zip(written["run"], written["reference"], strict=True):
        assert same(tensors, expected) and len(facts["history"]) == len(expected_facts["history"])
    assert_same_end(job, reference)


@pytest.mark.parametrize("error", [RunError("no space left"), ZeroDivisionError()], ids=["of the disk", "of the program"])
def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next_step(config_of, begin, monkeypatch, error):
    job, fifth, taken = begin(config_of()), threading.Event(), []

    def fail(*arguments):
        fifth.wait(60)
        raise error

    monkeypatch.setattr(run_directory, "save_checkpoint", fail)
    before_step(job, 5, lambda: fifth.set() or job.writer._thread.join())
    take = job.step.take
    job.step.take = lambda batch: taken.append(1) or take(batch)
    with pytest.raises(type(error)):
        job.train()
    assert len(taken) == 5, "four in the first epoch, and the one that was under way"


def test_the_last_checkpoint_is_on_disk_when_training_ends_or_breaks_off(config_of, begin, monkeypatch):
    save = run_directory.save_checkpoint

    def slow(*arguments):
        time.sleep(0.2)
        save(*arguments)

    monkeypatch.setattr(run_directory, "save_checkpoint", slow)
    job, broken, stopped = (begin(config_of(), name) for name in ("whole", "broken", "stopped"))
    job.train()
    assert run_directory.load_checkpoint(job.directory)[1]["position"]["phase"] == 1
    before_step(broken, 5, crash)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    assert run_directory.load_checkpoint(broken.directory)[1]["position"]["pass"] == 1
    stop_at(stopped, 6)
    with pytest.raises(Interrupted):
        stopped.train()
    assert run_directory.load_checkpoint(stopped.directory)[1]["position"]["step"] == 6
