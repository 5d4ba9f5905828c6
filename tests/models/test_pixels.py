"""Tests of fastrobust.models.pixels: the normalisation by a kernel, and points that another kernel has normalised, are those
of torch's operations."""

import pytest
import torch
from torch import nn
from triton_kernels import DEVICE, needs_kernels

from fastrobust.attack.threat import Threat
from fastrobust.models import Normalized, fused
from fastrobust.models.pixels import KernelNormalized, Seen, Sees

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def made(channels: int, kernels: bool, network: nn.Module | None = None) -> Normalized:
    mean, std = (0.49, 0.48, 0.45)[:channels], (0.25, 0.24, 0.26)[:channels]
    model = Normalized(network or nn.Identity(), mean, std).to(DEVICE)
    fused.prepare(model, kernels)
    return model


def images(shape=(5, 3, 7, 9)) -> torch.Tensor:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def rounding(precision: str) -> dict:
    """How near two results must be. Triton's interpreter cuts bf16 instead of rounding it."""
    cut = precision == "bf16" and DEVICE.type == "cpu"
    return {"rtol": 2**-7 if cut else 0, "atol": 0}


@needs_kernels
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_normalised_image_is_that_of_torch(precision, channels):
    """In the precision of the passes, which autocast would cast to; and the gradient, in fp32."""
    found, dtype = [], DTYPES[precision]
    for kernels in (False, True):
        model, x = made(channels, kernels), images((5, channels, 7, 9)).requires_grad_()
        with torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32"):
            seen = model(x)
        assert seen.dtype == (dtype if kernels else torch.float32)
        seen = seen.to(dtype)
        (gradient,) = torch.autograd.grad(seen, x, images((5, channels, 7, 9)).to(dtype) - 0.5)
        found.append((seen, gradient))
    (seen, gradient), (mine, my_gradient) = found
    torch.testing.assert_close(mine, seen, **rounding(precision))
    assert torch.equal(my_gradient, gradient) and gradient.any()
    assert my_gradient.dtype == torch.float32 and mine.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
@pytest.mark.parametrize("precision", DTYPES)
def test_a_point_of_an_attack_is_that_of_torch(precision):
    """After the start and after a step the network gets what it would get for x + delta."""
    x, network = images(), nn.Conv2d(3, 4, 3).to(DEVICE)
    model, dtype = made(3, True, network), DTYPES[precision]
    threat = Threat(8 / 255, kernels=True, sees=Sees(model.mean, model.std, dtype)).scaled(0.5)
    delta = threat.start(x)
    climbed = threat.climb(delta, torch.randn_like(x).to(dtype), 0.02, x)
    for moved in (delta, climbed):
        point = threat.point(x, moved)
        assert isinstance(point, Seen) and point.dtype == dtype
        expected = (((x + moved) - model.mean) / model.std).to(dtype)
        with torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32"):
            found, right = model(point), network(expected)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(point.as_subclass(torch.Tensor), expected, **rounding(precision))
        torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    assert not torch.equal(delta, climbed)
    kept = climbed.clone()
    assert torch.equal(threat.point(x, kept), x + kept), "what no kernel made is added"


@needs_kernels
def test_a_gradient_of_less_precision_moves_as_its_signs_say():
    """Also where no kernel can take it: alpha is not rounded to half precision."""
    x = images()
    gradient = torch.randn_like(x).half()
    plain, mine = Threat(8 / 255), Threat(8 / 255, kernels=True)
    expected = plain.climb(torch.zeros_like(x), gradient.float(), 0.02, x)
    for given in (gradient, gradient.contiguous()):
        for threat in (plain, mine):
            assert torch.equal(threat.climb(torch.zeros_like(x), given, 0.02, x), expected)


def test_seen_images_pass_and_stay_seen():
    """What a learner does to its input keeps it seen; what a network does to it does not."""
    model = made(3, False, nn.Conv2d(3, 4, 3).to(DEVICE))
    model.__class__ = KernelNormalized
    x = images()
    plain = Normalized.forward(model, x)
    seen = ((x - model.mean) / model.std).as_subclass(Seen)
    asked = seen.detach().requires_grad_()
    assert isinstance(asked, Seen) and asked.requires_grad and type(seen + 1) is torch.Tensor
    out = model(asked)
    assert torch.equal(out, plain) and type(out) is torch.Tensor
    (gradient,) = torch.autograd.grad(out.sum(), asked)
    assert gradient.shape == x.shape and gradient.any()
    model(asked).sum().backward()
    assert torch.equal(asked.grad, gradient)


@needs_kernels
@pytest.mark.parametrize("why", ["fp64", "contiguous memory"])
def test_what_the_kernel_cannot_read_torch_does(monkeypatch, why):
    from fastrobust.models import pixel_kernels

    monkeypatch.setattr(pixel_kernels, "normalise", lambda *arguments: pytest.fail("the kernel was used"))
    model, x = made(3, True), images()
    x = x.double() if why == "fp64" else x.contiguous()
    assert torch.equal(model(x), (x - model.mean) / model.std)
