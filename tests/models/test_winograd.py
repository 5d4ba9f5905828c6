"""Tests of fastrobust.models.winograd: convolutions, their gradients and where they are used, against torch's in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.models import winograd
from fastrobust.models.winograd import Filtering

pytest.importorskip("numba")
TOLERANCE = 5e-5  # of the largest number: ten times what was measured


def wrong_by(found, right):
    return ((found - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (7, 7), (1, 1), (2, 5), (14, 13), (3, 12)], ids=str)
@pytest.mark.parametrize("channels, outputs", [(64, 64), (64, 96)])
def test_outputs_and_gradients_are_those_of_a_plain_convolution(size, channels, outputs, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, channels, *size, generator=generator)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    dy = torch.randn(3, outputs, *size, generator=generator)
    layouts = [(x, weight), tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, weight))]
    for x, weight in layouts:
        asked = [t.clone().requires_grad_() for t in (x, weight)]
        with Filtering():
            found = F.conv2d(*asked, None, 1, 1)
        assert "_Convolution" in type(found.grad_fn).__name__ and found.is_contiguous(memory_format=torch.channels_last)
        right = F.conv2d(x.double(), weight.double(), padding=1)
        assert wrong_by(found, right) < TOLERANCE
        exact = [t.double().requires_grad_() for t in (x, weight)]
        wanted = torch.autograd.grad(F.conv2d(*exact, padding=1), exact, dy.double())
        for mine, theirs in zip(torch.autograd.grad(found, asked, dy), wanted, strict=True):
            assert mine.shape == theirs.shape and wrong_by(mine, theirs) < TOLERANCE


def test_a_filter_of_one_weight_moves_the_image():
    x = torch.arange(2 * 64 * 6 * 6).remainder(7).reshape(2, 64, 6, 6).float()
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(64, 64, 3, 3)
            weight[torch.arange(64), torch.arange(64), i, j] = 1
            right = F.pad(x, (1, 1, 1, 1))[:, :, i : i + 6, j : j + 6]
            assert wrong_by(winograd.convolved(x, weight)[0], right) < TOLERANCE


class Network(nn.Module):
    def __init__(self, channels: int = 64):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding="same"), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(channels, 10),
        )

    def forward(self, x):
        return self.layers(self.first(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_has_the_gradients_of_plain_passes(frozen):
    torch.manual_seed(0)
    mine = Network().requires_grad_(not frozen).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(mine).double()
    x, y = torch.rand(4, 3, 9, 9), torch.arange(4)
    found, right = x.clone().requires_grad_(), x.double().requires_grad_()
    with Filtering():
        loss = F.cross_entropy(mine(found), y)
    loss.backward()  # outside of it
    F.cross_entropy(exact(right), y).backward()
    assert wrong_by(found.grad, right.grad) < 1e-3
    pairs = [(p.grad, q.grad) for p, q in zip(mine.parameters(), exact.parameters(), strict=True)]
    if frozen:
        assert all(p is q is None for p, q in pairs)
    else:  # of all weights together: before a BatchNorm a bias has no gradient but rounding
        assert wrong_by(*(torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True))) < 1e-3


OTHERS = {
    "stride": {"stride": 2, "padding": 1},
    "no border": {"padding": 0},
    "wide border": {"padding": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "five": {"kernel_size": 5, "padding": 1},
    "few outputs": {"out_channels": 63, "padding": 1},
    "few inputs": {"in_channels": 63, "padding": 1},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_left_alone(name):
    layer = nn.Conv2d(**({"in_channels": 64, "out_channels": 64, "kernel_size": 3} | OTHERS[name]))
    x = torch.rand(2, layer.in_channels, 9, 9)
    with Filtering():
        found = layer(x)
    assert torch.equal(found, layer(x)) and "_Convolution" not in type(found.grad_fn).__name__


def test_half_and_double_precision_and_empty_batches_are_left_alone():
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.rand(2, 64, 5, 5)
    with Filtering():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
        assert layer.float()(x[:0]).shape == (0, 64, 5, 5)


def test_a_second_derivative_is_refused():
    x, layer = torch.rand(2, 64, 5, 5, requires_grad=True), nn.Conv2d(64, 64, 3, padding=1)
    with Filtering():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_what_a_model_lacks_is_named(monkeypatch):
    assert winograd.trouble(Network(), 64) is None
    assert "no convolution of 3 x 3 pixels, stride 1 and 64 channels" in winograd.trouble(Network(32), 64)

    def no_llvm():
        raise OSError("Could not find libllvmlite.so\nmore")

    monkeypatch.setattr(winograd, "_kernels", no_llvm)
    assert winograd.trouble(Network(), 64) == "it needs numba (pip install numba): Could not find libllvmlite.so"
