"""Tests of fastrobust.models.fused: BatchNorm and ReLU as kernels against torch in fp64. Where Triton is but no GPU, its
interpreter runs the kernels."""

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_kernels import DEVICE, needs_kernels

from fastrobust.models import create, fused
from fastrobust.models.fused import norm_add_relu, norm_relu
from fastrobust.runtime.torchvision_compat import import_torchvision

CIFAR = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
PRECISE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}  # relative error; half precisions round once


def norm(channels: int, fast: bool, train: bool = True, offset: float = 0.0) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    made = nn.BatchNorm2d(channels, momentum=0.3).to(DEVICE)
    with torch.no_grad():
        made.weight.uniform_(0.5, 1.5)
        made.bias.normal_(0, 0.2)
        made.running_mean.normal_(offset, 0.3)
        made.running_var.uniform_(0.5, 2)
    fused.prepare(made, fast)
    return made.train(train)


def pixels(shape, dtype, seed: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + offset).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def reference(layer, x, add, dy, where, dz=None, stored=None):
    """Results and gradients by name in fp64, by torch's own operations. `where` the sum comes: before, after, nowhere.
    stored: the sum as the kernel rounded it, which goes on from there."""
    exact = copy.deepcopy(layer).double()
    exact.kernels = None
    x = x.double().requires_grad_()
    add = None if add is None else add.double().requires_grad_()
    if where == "after":
        z, y = None, F.relu(fused.CountedNorm.forward(exact, x) + add)
        (y * dy).sum().backward()
    else:
        z = x if add is None else x + add
        rounded = z if stored is None else z + (stored.double() - z).detach()
        y = F.relu(fused.CountedNorm.forward(exact, rounded))
        ((y * dy).sum() + (0 if dz is None else (z * dz).sum())).backward()
    found = {"y": y, "x": x.grad, "weight": exact.weight.grad, "bias": exact.bias.grad}
    found |= {} if add is None else {"add": add.grad}
    found |= {"z": z} if dz is not None else {}
    return found | {"running_mean": exact.running_mean, "running_var": exact.running_var}


def relative(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@needs_kernels
@pytest.mark.parametrize("dtype", PRECISE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("where", ["nowhere", "before", "after"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (4, 64, 5, 5), (2, 80, 12, 13)], ids=str)
def test_kernels_are_torch_in_fp64(dtype, where, train, shape):
    """Odd sizes, channels that fill no tile, two tiles of channels; values and every gradient."""
    layer = norm(shape[1], True, train)
    x, dy = pixels(shape, dtype, 0, 0.5).requires_grad_(), pixels(shape, dtype, 1)
    add = None if where == "nowhere" else pixels(shape, dtype, 2).requires_grad_()
    dz = pixels(shape, dtype, 3) if where == "before" else None
    plain, z = copy.deepcopy(layer), None
    if where == "after":
        y = norm_add_relu(layer, x, add)
        y.backward(dy)
    else:
        z, y = norm_relu(layer, x, add)
        torch.autograd.backward([y] if dz is None else [z, y], [dy] if dz is None else [dz, dy])
    assert "NormRelu" in type(y.grad_fn).__name__, "the kernels were used"
    given = None if add is None else add.detach()
    expected = reference(plain, x.detach(), given, dy, where, dz, None if dz is None else z.detach())
    found = {"y": y, "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    found |= {} if add is None else {"add": add.grad}
    found |= {} if dz is None else {"z": z}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        own = torch.float32 if name in ("weight", "bias", "running_mean", "running_var") else dtype
        assert relative(value, expected[name]) < PRECISE[own] * (3 if name == "weight" else 1), name
    assert y.dtype == x.grad.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_a_large_mean_costs_no_digits():
    """The mean is 1,000 standard deviations: sums of squares would lose the variance in fp32."""
    layer, x, dy = norm(5, True), pixels((8, 5, 9, 9), torch.float32, 0, 1000.0), pixels((8, 5, 9, 9), torch.float32, 1)
    expected = reference(layer, x, None, dy, "nowhere")
    assert relative(norm_relu(layer, x)[1], expected["y"]) < 1e-4
    assert relative(layer.running_var, expected["running_var"]) < 1e-5


@needs_kernels
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_an_attack_asks_for_no_gradient_of_weights(train):
    layer = norm(5, True, train).requires_grad_(False)
    before = layer.running_var.clone()
    x = pixels((2, 5, 4, 4), torch.float32, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(norm_relu(layer, x)[1].square().sum(), x)
    expected = x.detach().double().requires_grad_()
    exact = copy.deepcopy(layer).double()
    (right,) = torch.autograd.grad(F.relu(fused.CountedNorm.forward(exact, expected)).square().sum(), expected)
    assert relative(gradient, right) < 1e-5
    assert torch.equal(layer.running_var, before) == (not train)


@needs_kernels
def test_numbers_that_are_none_stay_so():
    """Divergence must not hide behind the ReLU."""
    layer, x = norm(5, True), pixels((2, 5, 4, 4), torch.float32, 0)
    x[1, 2, 3, 3] = torch.nan
    y = norm_relu(layer, x)[1]
    assert y[:, 2].isnan().all() and y[:, [0, 1, 3, 4]].isfinite().all()


def networks():
    resnet = import_torchvision().models.resnet
    return {
        "ours": lambda: create("preact_resnet18_w16", channels=3, classes=4, **CIFAR),
        "paper": lambda: create("preact_resnet18_paper", channels=3, classes=4, **CIFAR),
        "basic": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4),
        "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=4),
    }


@needs_kernels
@pytest.mark.parametrize(("name", "plain_norms"), [("ours", 0), ("paper", 0), ("basic", 3), ("bottleneck", 4)])
def test_a_network_with_kernels_is_the_network(monkeypatch, name, plain_norms):
    """Logits, the gradients of every weight and of the input, and the whole state are as near to those in fp64 as torch's
    are. A BatchNorm in a shortcut has no ReLU."""
    torch.manual_seed(0)
    plain, calls = networks()[name]().to(DEVICE, memory_format=torch.channels_last), []
    exact, other = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    fused.prepare(other, kernels=True)
    assert other.state_dict().keys() == plain.state_dict().keys()
    original = fused._kernels
    monkeypatch.setattr(fused, "_kernels", lambda *a, **k: calls.append(1) or original(*a, **k))
    found = []
    for model in (exact, plain, other):
        dtype = next(model.parameters()).dtype
        x = pixels((4, 3, 16, 16), torch.float32, 5).to(dtype).requires_grad_()
        logits = model(x)
        logits.logsumexp(1).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append({"logits": logits, "x": x.grad, **gradients, **model.state_dict(prefix="after.")})
    assert len(calls) == sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules()) - plain_norms
    for key, right in found[0].items():
        torchs, mine = (relative(other[key], right.double()) for other in found[1:])
        assert mine <= 5 * torchs + 2e-5, key


@needs_kernels
def test_compiled_kernels_are_those():
    """torch.compile sees the kernels as operations that it leaves alone."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        layer, x = norm(5, True), pixels((2, 5, 4, 4), torch.float32, 0).requires_grad_()
        add = pixels((2, 5, 4, 4), torch.float32, 1)

        def run(x, layer=layer, add=add):
            z, y = norm_relu(layer, x * 2, add)
            return (z.sin() + y).sum()

        run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
        run(x).backward()
        found.append([x.grad, layer.weight.grad, layer.running_mean, layer.running_var])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


# ---- without kernels


@pytest.mark.parametrize("why", ["asked for none", "contiguous memory", "fp64", "one number for each channel"])
def test_what_the_kernels_cannot_do_torch_does(monkeypatch, why):
    monkeypatch.setattr(fused, "have_kernels", lambda device: True)
    monkeypatch.setattr(fused, "_kernels", lambda *a, **k: pytest.fail("kernels were used"))
    layer = norm(5, why != "asked for none", train=why != "one number for each channel")
    x = torch.rand(2, 5, 4, 4, device=DEVICE)
    if why == "one number for each channel":
        x = x[:1, :, :1, :1]
    if why != "contiguous memory":
        x = x.contiguous(memory_format=torch.channels_last)
    if why == "fp64":
        x, layer = x.double(), layer.double()
    expected = copy.deepcopy(layer)
    expected.__class__ = nn.BatchNorm2d
    assert torch.equal(norm_relu(layer, x)[1], F.relu(expected(x)))
    assert torch.equal(norm_add_relu(layer, x, x), F.relu(expected(x) + x))
    assert torch.equal(layer.running_var, expected.running_var)


def test_batches_are_counted_as_torch_counts_them():
    """A layer that is used twice counts twice; one in eval mode does not count; unusual ones are left alone. What was
    counted is in every state that is taken, once, and in copies; a state that is loaded takes its place."""
    torch.manual_seed(0)
    shared, still, odd = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)
    plain = nn.Sequential(shared, still, nn.ReLU(), shared, odd).to(DEVICE)
    other = copy.deepcopy(plain)
    fused.prepare(other)
    x, states = torch.rand(2, 3, 4, 4, device=DEVICE), []
    taken = lambda model: {name: t.clone() for name, t in model.state_dict().items()}
    for model in (plain, other):
        model.train()[1].eval()
        for _ in range(3):
            model(x)
        copied = copy.deepcopy(model)
        model(x)
        states.append([taken(copied), taken(model), taken(model)])
        model(x)
        model.load_state_dict(copied.state_dict())
        states[-1].append(taken(model))
    numbers = [[n.item() for k, n in state.items() if "num_batches" in k] for state in states[1]]
    assert numbers == [[6, 0, 6, 3], [8, 0, 8, 4], [8, 0, 8, 4], [6, 0, 6, 3]]
    for expected, found in zip(*states, strict=True):
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def test_kernels_that_cannot_run_say_why(monkeypatch):
    fused._tried.cache_clear()
    monkeypatch.setitem(sys.modules, "fastrobust.models.norm_kernels", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "norm_kernels" in fused.trouble(DEVICE) and not fused.have_kernels(DEVICE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fused.trouble(DEVICE) == "they need Triton, which is not installed"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert fused.trouble(torch.device("cpu")) == "they need a GPU"
    fused._tried.cache_clear()
