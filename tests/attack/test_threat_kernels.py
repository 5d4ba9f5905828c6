"""Tests of fastrobust.attack.threat_kernels: the numbers of the plain functions, to the last digit."""

import pytest
import torch
from triton_kernels import DEVICE, needs_kernels

from fastrobust.attack.threat import Threat


def made(shape=(3, 3, 7, 9)):
    """Images with pixels at both ends of the box; a gradient with zeros and a number that is none."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    x.view(-1)[:20], x.view(-1)[20:40] = 0.0, 1.0
    gradient.view(-1)[::7] = 0.0
    gradient.view(-1)[3] = torch.nan
    return (t.to(DEVICE).contiguous(memory_format=torch.channels_last) for t in (x, gradient))


@needs_kernels
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["numbers", "tensors"])
def test_a_step_has_the_numbers_of_the_plain_functions(monkeypatch, kind, project):
    (x, gradient), radius, alpha = made(), kind(8 / 255), kind(10 / 255)
    if kind is torch.tensor:
        radius, alpha = radius.to(DEVICE), alpha.to(DEVICE)
    plain, mine = Threat(radius), Threat(radius, kernels=True)
    torch.manual_seed(1)
    delta = plain.start(x)
    expected = plain.climb(delta, gradient, alpha, x, project)
    monkeypatch.setattr(Threat, "step", lambda *arguments: pytest.fail("torch's operations were used"))
    found = mine.climb(delta, gradient, alpha, x, project)
    assert torch.equal(found, expected) and found.stride() == x.stride()
    assert (found != delta).any() and (not project or (found == radius).any())


@needs_kernels
@pytest.mark.parametrize("clip", [True, False])
def test_a_start_has_the_same_random_numbers(monkeypatch, clip):
    x, _ = made()
    torch.manual_seed(1)
    expected = Threat(0.1).start(x, clip)
    monkeypatch.setattr("fastrobust.attack.threat.uniform_start", lambda *arguments: pytest.fail("torch's were used"))
    torch.manual_seed(1)
    assert torch.equal(Threat(0.1, kernels=True).start(x, clip), expected)


@needs_kernels
def test_what_does_not_lie_side_by_side_goes_to_torch():
    x, gradient = made()
    mine, delta = Threat(0.1, kernels=True), torch.zeros_like(x)
    expected = Threat(0.1).climb(delta, gradient, 0.05, x)
    assert torch.equal(mine.climb(delta, gradient.contiguous(), 0.05, x), expected)
    assert torch.equal(mine.climb(delta.double(), gradient.double(), 0.05, x.double()).float(), expected)
