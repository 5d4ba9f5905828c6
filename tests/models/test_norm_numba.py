"""Tests of fastrobust.models.norm_numba: BatchNorm and ReLU by numba's kernels on a CPU, against torch in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.models import create, fused
from fastrobust.models.fused import norm_add_relu, norm_relu
from fastrobust.runtime.torchvision_compat import import_torchvision

pytest.importorskip("numba")
PRECISE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # relative error; bf16 rounds once
SHAPES = [(4, 16, 8, 8), (3, 7, 5, 3), (128, 64, 4, 4), (2, 200, 9, 9), (64, 32, 16, 16)]


def norm(channels: int, train: bool = True) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    made = nn.BatchNorm2d(channels, momentum=0.3)
    with torch.no_grad():
        made.weight.uniform_(-1, 1.5)
        made.bias.normal_(0, 0.2)
        made.running_mean.normal_(0, 0.3)
        made.running_var.uniform_(0.5, 2)
    fused.prepare(made, numba=True)
    return made.train(train)


def pixels(shape, dtype, seed: int, offset: float = 0.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def relative(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", PRECISE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_torch_in_fp64(dtype, summed, train, shape):
    """Values, every gradient and the running averages; the sum goes on from where it was rounded."""
    layer, x, dy = norm(shape[1], train), pixels(shape, dtype, 0, 0.5).requires_grad_(), pixels(shape, dtype, 1)
    exact = copy.deepcopy(layer).double()
    exact.kernels = None
    add, dz = (pixels(shape, dtype, k) for k in (2, 3)) if summed else (None, None)
    add = add.requires_grad_() if summed else None
    z, y = norm_relu(layer, x, add)
    assert "NormRelu" in type(y.grad_fn).__name__ and y.dtype == dtype
    torch.autograd.backward([y, z] if summed else [y], [dy, dz] if summed else [dy])
    wide, more = (None if t is None else t.detach().double().requires_grad_() for t in (x, add))
    whole = wide + more if summed else wide
    expected = F.relu(fused.CountedNorm.forward(exact, whole + (z.detach().double() - whole).detach() if summed else whole))
    ((expected * dy).sum() + ((whole * dz).sum() if summed else 0)).backward()
    found = {"y": (y, expected), "x": (x.grad, wide.grad), "weight": (layer.weight.grad, exact.weight.grad)}
    found |= {"bias": (layer.bias.grad, exact.bias.grad), "mean": (layer.running_mean, exact.running_mean)}
    found |= {"var": (layer.running_var, exact.running_var)} | ({"add": (add.grad, more.grad)} if summed else {})
    for name, (mine, right) in found.items():
        own = dtype if name in ("y", "x", "add") else torch.float32
        assert relative(mine, right) < PRECISE[own] * (3 if name in ("weight", "x") else 1), name


def test_a_large_mean_costs_no_digits():
    """The mean is 1,000 standard deviations: plain sums of squares would lose the variance in fp32."""
    layer, x = norm(5), pixels((8, 5, 9, 9), torch.float32, 0, 1000.0)
    exact = copy.deepcopy(layer).double()
    exact.kernels = None
    norm_relu(layer, x)
    fused.CountedNorm.forward(exact, x.double())
    assert relative(layer.running_var, exact.running_var) < 1e-5


def test_threads_change_no_bit():
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            layer, x = norm(64), pixels((64, 64, 16, 16), torch.bfloat16, 0).requires_grad_()
            y = norm_relu(layer, x)[1]
            y.backward(pixels(x.shape, torch.bfloat16, 1))
        finally:
            torch.set_num_threads(threads)
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nan_stays_and_infinity_is_rounded_to():
    layer, x = norm(2, train=False), pixels((1, 2, 2, 2), torch.bfloat16, 0)
    x[0, 0, 0, 0] = torch.nan
    assert norm_relu(layer, x)[1].isnan().sum() == 1
    with torch.no_grad():
        layer.bias.view(torch.int32).fill_(0x7FFFFFFF)  # a NaN that rounding would carry into a zero
        assert norm_relu(layer, pixels((1, 2, 2, 2), torch.bfloat16, 0))[1].isnan().all()
        layer.bias.zero_()
        layer.weight.fill_(1e38)
        assert norm_relu(layer, pixels((1, 2, 2, 2), torch.bfloat16, 0).fill_(1e5))[1].isinf().all()


@pytest.mark.parametrize("what", ["fp16", "one number for each channel", "contiguous", "added after the norm"])
def test_what_the_kernels_cannot_do_torch_does(what):
    layer, x = norm(4), pixels((2, 4, 3, 3), torch.float32, 0).requires_grad_()
    if what == "fp16":
        layer, x = layer.eval().half(), x.detach().half().requires_grad_()
    elif what == "contiguous":
        x = x.detach().contiguous(memory_format=torch.contiguous_format).requires_grad_()
    elif what == "one number for each channel":
        layer, x = layer.eval(), x.detach()[:1, :, :1, :1].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm_add_relu(layer, x, x) if what == "added after the norm" else norm_relu(layer, x)[1]
    assert "NormRelu" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("name, side", [("preact_resnet18", 16), ("resnet18", 64)])
def test_a_whole_network_has_the_gradients_of_plain_passes(name, side):
    """A number near 0 passes the ReLU here and not there: single entries of a gradient differ."""
    import_torchvision()
    torch.manual_seed(0)
    plain = create(name, channels=3, classes=5, mean=(0.5,) * 3, std=(0.25,) * 3).to(memory_format=torch.channels_last)
    mine, x = copy.deepcopy(plain), pixels((16, 3, side, side), torch.float32, 0)
    fused.prepare(plain)
    fused.prepare(mine, numba=True)
    grads = []
    for model in (plain, mine):
        given = x.clone().requires_grad_()
        F.cross_entropy(model.train()(given), torch.arange(16) % 5).backward()
        grads.append([given.grad, *(p.grad for p in model.parameters())])
    assert any(getattr(m, "kind", None) == fused.NUMBA for m in mine.modules())
    assert max(relative(a, b.double()) for a, b in zip(*grads, strict=True)) < 2e-2
    assert plain.state_dict().keys() == mine.state_dict().keys()
