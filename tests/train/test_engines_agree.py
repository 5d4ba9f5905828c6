"""Every engine gives the numbers of eager steps, to a stated tolerance, on a network that is small enough for Triton's
interpreter: there, and on a GPU, `fused` runs its kernels; elsewhere it is torch's operations on half-precision weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn
from training_runs import Steps, on_noise, run_steps
from triton_kernels import CUDA, DEVICE, missing

from fastrobust.models import fused, winograd
from fastrobust.models.products import Products
from fastrobust.train import engine, learner
from tests.gpusim import sim

KERNELS, NUMBA = missing() is None, importlib.util.find_spec("numba") is not None
METHODS = ["standard", "fgsm", "fgsm-previous", "n_fgsm", "pgd", "free", "class_uap", "rs_cs", "gradalign", "awp"]
INTERPRETED = [("fgsm", "fp16"), ("free", "fp16"), ("gradalign", "fp32")]  # of which a few cost a minute
CASES = [(m, p) for m in METHODS for p in ("fp32", "fp16", "bf16")] if CUDA or not KERNELS else INTERPRETED
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}  # of the sum of losses after a few steps, relative


class Small(nn.Module):
    """Convolutions, and BatchNorms with a ReLU: one alone, one before which a shortcut is added."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, out = fused.norm_relu(self.bn1, self.conv1(x))
        _, out = fused.norm_relu(self.bn2, self.conv2(out), x)
        return self.linear(out.mean((2, 3)))


def steps(method: str, precision: str, name: str) -> Steps:
    """Four steps by an engine, or on static buffers as a graph has them."""
    torch.manual_seed(7)
    noise = on_noise(method, precision, DEVICE.type, engine="eager" if name == "static" else name, network=Small())
    if name == "static":
        return run_steps(noise, 4, lambda step, batch: engine.StaticStep(step.take, batch))
    assert (noise.step.learner.convolutions is winograd.Filtering) == (name == "winograd")
    assert (noise.step.learner.convolutions is Products) == (name == "numba" and precision == "bf16")
    assert (getattr(noise.step.learner.model.network.bn1, "kind", None) == fused.NUMBA) == (name in engine.BY_NUMBA)
    if "fused" in name:
        assert noise.step.threat.kernels == KERNELS and (noise.step.learner.shadow is None) == (
            precision == "fp32" or noise.step.method.reads_weights
        )
    done = run_steps(noise, 4, lambda step, batch: step)
    assert "cuda_graph" not in name or isinstance(noise.step._run, engine.GraphStep)
    return done


@pytest.mark.skipif(sim.HERE, reason="the simulated GPU computes nothing")
@pytest.mark.parametrize(("method", "precision"), CASES)
def test_engines_agree(method, precision, monkeypatch):
    monkeypatch.setattr(winograd, "CHANNELS", 8)
    monkeypatch.setattr(learner, "have_amx", lambda: True)
    plain = steps(method, precision, "eager")
    others = ["cuda_graph", "fused+cuda_graph"] if CUDA else []
    if NUMBA and not CUDA:
        others = {"fp32": ["numba", "winograd"], "bf16": ["numba"], "fp16": []}[precision]
    for name in ("static", "fused", *others):
        found = steps(method, precision, name)
        assert found.rates == plain.rates and len(set(plain.rates)) == 4, name
        assert found.losses == pytest.approx(plain.losses, rel=TOLERANCE[precision]), name
        assert found.tensors.keys() == plain.tensors.keys(), name
        for key, value in plain.tensors.items():
            if not value.is_floating_point() and key != "sums.correct":
                assert torch.equal(found.tensors[key], value), (name, key)
    batches = plain.tensors["model.network.bn1.num_batches_tracked"].item()
    passes = {"standard": 1, "fgsm": 2, "fgsm-previous": 2, "n_fgsm": 2, "pgd": 3, "free": 2, "class_uap": 2}
    assert batches == 4 * passes.get(method, batches / 4) > 0
