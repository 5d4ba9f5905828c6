"""Gradients of several parts of a batch make one update: that of the whole batch, where no BatchNorm looks at its part."""

from __future__ import annotations

import pytest
import torch
from training_runs import STEP_METHODS, on_noise, run_steps

from fastrobust.config import reading
from fastrobust.data import loaders
from fastrobust.runtime.distributed import World
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import engine
from fastrobust.train.learner import Part


def in_parts(parts: int, name: str = "fgsm", precision: str = "fp32", side: int = 28, **more):
    """A step on noise; 28 pixels are for a network without BatchNorm."""
    phase = {"epochs": 20, "batch_size": 16, "resolution": side, "accumulate": parts}
    return on_noise(name, precision, side=side, more={"phases": [phase]} | more)


WHOLE = {
    "standard": {"name": "standard"},
    "fgsm": {"name": "fgsm", "init": "zero"},
    "fgsm-previous": {"name": "fgsm", "init": "previous"},
    "fgsm-ibp": {"name": "fgsm", "init": "zero", "ibp_weight": 0.3},
    "n_fgsm": {"name": "n_fgsm"},
    "pgd": {"name": "pgd", "steps": 2, "alpha": "2/255", "init": "zero"},
    "trades": {"name": "trades", "steps": 2},
}


@pytest.mark.parametrize("method", WHOLE)
def test_parts_make_the_update_of_the_whole_batch(method, monkeypatch):
    """In fp32, to rounding. A pixel whose gradient is nearly 0 may go the other way, and with it what is kept of it."""
    for name in ("rand_like", "randn_like"):
        monkeypatch.setattr(torch, name, lambda t: 0.5 + 0.5 * (37 * t.detach()).sin())
    monkeypatch.setattr("fastrobust.attack.threat.Threat.noise", lambda self, shape, *given: torch.full(shape, 0.01))
    more = {
        "method": WHOLE[method],
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "clip_gradients": 0.5,
        "averaging": {"decay": 0.5},
        "label_smoothing": 0.1,
    }
    whole, parts = (run_steps(in_parts(k, **more), 4) for k in (1, 4))
    assert parts.rates == whole.rates and parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert parts.tensors["sums.updates"] == 4 and parts.tensors["sums.seen"] == 64
    for name, t in whole.tensors.items():
        if name.startswith(("model.", "averaged.")):
            torch.testing.assert_close(parts.tensors[name], t, rtol=0, atol=1e-4, msg=lambda text, name=name: name + text)
    for name, t in whole.state.items():
        assert (parts.state[name] - t).abs().gt(1e-4).float().mean() < 0.01, name


def test_the_mean_is_that_of_the_images_where_parts_differ_in_size():
    """As in a trial with fewer images."""
    states = []
    for parts in (4, 1):
        noise = in_parts(parts, method={"name": "fgsm", "init": "zero"}, data={"dataset": "image_folder"})
        noise.step.take(next(noise.batches(1)).first(10))
        assert noise.step.learner.part == (Part(False, True, 0.3) if parts == 4 else Part())
        noise.step.take(next(noise.batches(1)).first(3))
        assert noise.step.learner.part == (Part(False, True, 1 / 3) if parts == 4 else Part())
        states.append(noise.step.learner.model.state_dict())
    for name, t in states[0].items():
        torch.testing.assert_close(t, states[1][name], rtol=0, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_engines_take_parts(precision):
    """On static buffers, as a graph is recorded, and eagerly."""
    plain = run_steps(in_parts(4, "fgsm-previous", precision, 8), 3)
    static = in_parts(4, "fgsm-previous", precision, 8)
    static = run_steps(static, 3, lambda step, batch: engine.StaticStep(step.take, batch))
    assert all(torch.equal(t, static.tensors[name]) for name, t in plain.tensors.items())
    assert plain.state["delta"].any()


def test_fused_kernels_leave_out_half_precision_weights():
    """They hold the gradients of one backward pass."""
    assert in_parts(4, precision="bf16", side=8, engine="fused").step.learner.shadow is None
    assert in_parts(1, precision="bf16", side=8, engine="fused").step.learner.shadow is not None


def test_a_new_phase_forgets_the_parts():
    noise = in_parts(4)
    noise.step(next(noise.batches(1)))
    assert noise.step.learner.part == Part(False, True, 0.25)
    noise.step.enter_phase(16, 3, 28)
    assert noise.step.learner.part == Part()


@pytest.mark.parametrize("method", sorted(STEP_METHODS.keys() - WHOLE.keys() | {"free"}))
def test_methods_that_need_the_whole_batch_refuse(method):
    with pytest.raises(ConfigError, match=rf"accumulate: method {method.split('-')[0]} needs its whole batch at once"):
        in_parts(2, method)


def test_more_parts_than_images_are_refused(config_of):
    def phases(batch_size, parts):
        return [{"epochs": 1, "batch_size": batch_size, "resolution": 28, "accumulate": parts}]

    with pytest.raises(ConfigError, match="batch_size is 3: accumulate asks for 4 parts of that"):
        loaders.Phases(config_of(phases=phases(3, 4)), torch.device("cpu"))
    with pytest.raises(ConfigError, match="accumulate asks for 4 parts of the 3 of each process"):
        loaders.Phases(config_of(phases=phases(6, 4)), torch.device("cpu"), World(0, 2, 0, True))
    assert reading.parse(config_of(phases=phases(6, 4)).to_dict(), "test").phases[0].accumulate == 4
