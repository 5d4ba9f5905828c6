"""Tests of fastrobust.models.products: convolutions of small images as matrix products, against torch in fp64. They run on
any processor; AMX makes them worth it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrobust.models import products


def made(channels, filters, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, height, width, generator=generator).bfloat16()
    weight = torch.randn(filters, channels, 3, 3, generator=generator) * 0.05
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x.requires_grad_(), weight.requires_grad_()


def relative(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("half_weights", [False, True])
@pytest.mark.parametrize("size, stride", [((4, 4), 1), ((3, 2), 1), ((1, 1), 1), ((8, 8), 2), ((7, 5), 2)], ids=str)
def test_outputs_and_gradients_are_those_of_a_plain_convolution(size, stride, half_weights):
    x, weight = made(64, 96, *size)
    weight = weight.detach().bfloat16().requires_grad_() if half_weights else weight
    with products.Products():
        y = torch.conv2d(x, weight, None, stride, 1)
    assert "_Convolution" in type(y.grad_fn).__name__ and y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = [y, *torch.autograd.grad(y, [x, weight], dy)]
    wide, exact = x.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()
    expected = torch.conv2d(wide, exact, None, stride, 1)
    for mine, right in zip(found, [expected, *torch.autograd.grad(expected, [wide, exact], dy.double())], strict=True):
        assert mine.shape == right.shape and relative(mine, right) < 4e-3  # rounded to bf16
    assert found[2].dtype == weight.dtype and found[1].dtype == torch.bfloat16


def test_a_bias_and_words_for_the_border():
    x, weight = made(64, 64, 4, 4)
    bias = torch.randn(64)
    with products.Products():
        assert torch.equal(
            torch.conv2d(x, weight, bias, 1, 1),
            torch.conv2d(x, weight, None, (1, 1), (1, 1)) + bias.bfloat16()[:, None, None],
        )


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 64, 5, 5, dtype=torch.bfloat16)},
        {"x": torch.zeros(2, 64, 4, 4)},
        {"x": torch.zeros(0, 64, 4, 4, dtype=torch.bfloat16)},
        {"weight": torch.zeros(64, 64, 1, 1)},
        {"weight": torch.zeros(32, 64, 3, 3)},
        {"padding": 0},
        {"padding": "same"},
        {"stride": 3},
        {"stride": (1, 2)},
        {"dilation": 2},
        {"groups": 2},
    ],
    ids=str,
)
def test_other_convolutions_are_torchs(change):
    given = {"x": torch.zeros(2, 64, 4, 4, dtype=torch.bfloat16), "weight": torch.zeros(64, 64, 3, 3), "padding": 1}
    assert products.fits(**given) and not products.fits(**given | change)


def test_a_network_in_half_precision_goes_through_them():
    """Under autocast, as a learner runs it: the convolutions of its last stage alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1, bias=False))
    x, seen = torch.rand(8, 3, 8, 8), []
    with torch.autocast("cpu", torch.bfloat16):
        plain = network(x).float()
        network[3].register_forward_hook(lambda module, given, out: seen.append(type(out.grad_fn).__name__))
        with products.Products():
            mine = network(x).float()
    assert "_Convolution" in seen[0] and relative(mine, plain.double()) < 0.02


def test_a_second_derivative_is_refused():
    x, weight = made(64, 64, 4, 4)
    with products.Products():
        y = torch.conv2d(x, weight, None, 1, 1)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        gradient.float().sum().backward()
