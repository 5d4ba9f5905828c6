"""Tests of fastrobust.train.step: a step needs no run, and gives the weights that a Training of the same config gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_runs import CPU, METHODS, NEWER, SGD, TWO_PHASES, on_noise, same, weights

from fastrobust.attack.threat import Threat
from fastrobust.data import loaders
from fastrobust.data.batch import Batch
from fastrobust.models.weights import build_model
from fastrobust.runtime.distributed import World
from fastrobust.train import engine, schedules, step
from fastrobust.train.learner import Learner
from fastrobust.train.methods.free import Free
from fastrobust.train.optimizers import Sgd


def trained_step(config) -> step.Step:
    """All steps of a config, without a Training."""
    phases = loaders.Phases(config, CPU)
    loader = phases.enter(0)
    made = step.build(config, loader, CPU)
    for index, phase in enumerate(config.phases):
        loader = phases.enter(index)
        if index:
            made.enter_phase(phase.batch_size, loader.channels, phase.resolution)
        count = schedules.steps_in(config, phase, len(loader))
        for batch in loader.batches(config.seed, index, phase.batch_size, 0, count):
            made(batch)
    return made


@pytest.mark.parametrize(
    "changes",
    [*METHODS.values(), METHODS["free"] | SGD, TWO_PHASES, {"method": NEWER["class_uap"]}, {"method": NEWER["liet"]}],
    ids=[*METHODS, "free, sgd", "two phases", "class_uap", "liet"],
)
def test_a_step_gives_the_weights_of_a_training_and_writes_nothing(config_of, begin, tmp_path, monkeypatch, changes):
    config = config_of(**changes)
    job = begin(config)
    first = weights(job)
    job.train()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = sorted(tmp_path.rglob("*"))
    torch.manual_seed(987)  # whatever the state of the generator is
    made = trained_step(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert same(made.learner.model.state_dict(), weights(job)) and not same(weights(job), first)
    assert same(made.state, job.step.state)
    assert made.learner.updates.item() == job.history[-1]["updates"]


def test_a_step_of_ones_own_model_needs_no_config():
    """Which half of the image is bright? The loss falls, and the method keeps its state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    learner = Learner(model, Sgd(name="sgd"), torch.full((60,), 0.1))
    made = step.Step(learner, Free(name="free", replays=2), Threat(0.1), classes=2, examples=40)
    made.enter_phase(40, 1, 8)
    labels = torch.arange(40) % 2
    images = torch.randint(0, 100, (40, 1, 8, 8), dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 4 * label : 4 * label + 4] += 150
    losses = []
    for _ in range(30):
        learner.reset_sums()
        made(Batch(images, labels, torch.arange(40)))
        losses.append(learner.read_sums()[0] / 80)
    assert losses[0] > 0.3 and losses[-1] < 0.1
    assert learner.updates.item() == 60
    assert made.state["delta"].abs().max() <= 0.1 and made.state["delta"].any()


def test_a_step_prepares_itself_once_in_each_phase(monkeypatch):
    noise, prepared = on_noise("fgsm-previous"), []
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda *arguments: prepared.append(arguments[0]) or prepare(*arguments))
    for batch in noise.batches(3):
        noise.step(batch)
    assert prepared == ["eager"] and noise.step.state["delta"].any()
    noise.step.enter_phase(10, 3, 8)
    assert noise.step.state["delta"].shape == (10, 3, 8, 8) and not noise.step.state["delta"].any()
    noise.step(next(noise.loader.batches(0, 1, 10, 0, 1)))
    assert prepared == ["eager", "eager"] and noise.step.state["delta"].any()


def test_a_stored_step_goes_on_bit_by_bit():
    one, other = on_noise("free", "fp16"), on_noise("free", "fp16")
    batches = list(one.batches(4))
    for batch in batches[:2]:
        one.step(batch)
    stored, generator = one.step.state_dict(), torch.get_rng_state()
    copy = stored["state"]["delta"].clone()
    for batch in batches[2:]:
        one.step(batch)
    assert torch.equal(stored["state"]["delta"], copy), "a copy, not a view"
    kept = other.step.state["delta"].data_ptr()
    other.step.load_state_dict(stored)
    assert other.step.state["delta"].data_ptr() == kept, "in place"
    torch.set_rng_state(generator)
    for batch in batches[2:]:
        other.step(batch)
    assert same(one.step.learner.tensors(), other.step.learner.tensors()) and same(one.step.state, other.step.state)


def test_a_state_of_another_batch_size_is_refused():
    one, other = on_noise("free"), on_noise("free")
    other.step.enter_phase(10, 3, 8)
    with pytest.raises(RuntimeError, match=r"delta has shape \(10, 3, 8, 8\), stored \(16, 3, 8, 8\)"):
        other.step.load_state_dict(one.step.state_dict())
    with pytest.raises(KeyError, match="delta"):
        one.step.load_state_dict(one.step.state_dict() | {"state": on_noise("standard").step.state_dict()["state"]})


def test_the_scale_is_that_of_the_next_update():
    noise = on_noise("fgsm", warmup=2)  # epochs of 50 images, in batches of 16: 6.25 updates
    scales = []
    for batch in noise.batches(8):
        scales.append(noise.step.scale_now())
        noise.step(batch)
    updates = noise.step.learner.lr_table.numel()  # of 20 epochs
    assert scales == pytest.approx([min(1.0, (u + 0.5) / updates * 20 / 2) for u in range(8)])
    assert scales[0] < 0.1 and scales[-1] == 1.0
    assert on_noise("fgsm").step.scale_now() == 1.0


def test_processes_but_the_first_have_random_numbers_of_their_own(config_of):
    """And all begin with the same weights."""
    config = config_of()
    drawn, first = [], []
    for rank in range(3):
        world = World(rank, 3)
        loader = loaders.Phases(config_of(phases=[{"epochs": 1, "batch_size": 21, "resolution": 28}]), CPU, world).enter(0)
        made = step.build(config, loader, CPU, world)
        drawn.append(torch.rand(3).tolist())
        first.append({name: t.clone() for name, t in made.learner.model.state_dict().items()})
    assert len({tuple(numbers) for numbers in drawn}) == 3
    assert same(first[0], first[1]) and same(first[0], first[2])
    torch.manual_seed(config.seed)
    build_model(config, loader.classes)
    assert torch.rand(3).tolist() == drawn[0]
