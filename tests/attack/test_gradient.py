"""Tests of the gradient step of the attacks: losses against loops, gradients against differences, steps one at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.attack.gradient import ascend, cross_entropy, frozen, input_gradient, margin, margin_to, step
from fastrobust.attack.threat import Threat

TARGETS = torch.tensor([3, 0, 4, 2, 0])
LOSSES = {"cross-entropy": cross_entropy, "margin": margin, "margin to a target": margin_to(TARGETS)}


def slow_loss(name: str, logits: list[float], label: int, target: int) -> float:
    if name == "cross-entropy":
        return torch.tensor(logits).double().exp().sum().log().item() - logits[label]
    if name == "margin":
        return max(value for k, value in enumerate(logits) if k != label) - logits[label]
    return logits[target] - logits[label]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Softplus(), nn.Linear(9, 5)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 2, 2, generator=generator).double(), torch.tensor([0, 1, 2, 3, 4])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_one_example_at_a_time(name):
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)) - 4  # all negative
    labels = torch.tensor([0, 1, 2, 3, 5])
    found = LOSSES[name](logits, labels)
    rows = zip(logits.tolist(), labels.tolist(), TARGETS.tolist(), strict=True)
    assert found.tolist() == pytest.approx([slow_loss(name, *row) for row in rows], abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_each_examples_own_loss(model, batch, name):
    """Against central differences in fp64. `input_gradient` computes losses in fp32."""
    x, y = batch
    logits, gradient = input_gradient(model, x, y, LOSSES[name])
    assert torch.equal(logits, model(x).detach().float()) and not logits.requires_grad and not x.requires_grad
    for place in torch.eye(12).double().view(12, 1, 3, 2, 2):
        high, low = (LOSSES[name](model(x + sign * 1e-5 * place).detach(), y) for sign in (1, -1))
        slope = (gradient * place).flatten(1).sum(1)
        torch.testing.assert_close(slope, (high - low) / 2e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_and_many_steps(model, batch, name):
    x, y = batch
    delta = torch.zeros_like(x)
    start, visited = delta.clone(), []
    for _ in range(4):
        z = (x + delta).requires_grad_()
        loss = LOSSES[name](model(z), y).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        expected = torch.maximum(torch.minimum((delta + 0.02 * gradient.sign()).clamp(-0.05, 0.05), 1 - x), -x)
        logits, delta = step(model, x, y, delta, Threat(0.05), 0.02, LOSSES[name])
        assert torch.equal(delta, expected) and torch.equal(logits, model(z).detach().float())
        visited.append(loss.item())
    assert torch.equal(ascend(model, x, y, start, Threat(0.05), 0.02, 4, LOSSES[name]), delta)
    assert torch.equal(ascend(model, x, y, start, Threat(0.05), 0.02, 0, LOSSES[name]), start)
    assert visited == sorted(visited) and visited[0] < visited[-1] and start.eq(0).all()


def test_the_loss_is_the_cross_entropy_if_none_is_named(model, batch):
    x, y = batch
    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
    torch.testing.assert_close(input_gradient(model, x, y)[1], expected, rtol=1e-5, atol=1e-7)


def test_a_frozen_model_is_as_it_was_afterwards(model, batch):
    model[1].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert input_gradient(model, *batch)[1].abs().sum() > 0
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == flags == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
