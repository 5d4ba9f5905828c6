"""The losses that a config can name: their values and gradients against loops over examples, which methods take them, and
that training uses them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_learner import RATES, make_batches, make_model, same_weights, sgd
from torch import Tensor
from training_runs import STEP_METHODS, on_noise, run_steps

from fastrobust.config import parts, reading
from fastrobust.runtime.errors import ConfigError
from fastrobust.train.learner import Learner
from fastrobust.train.losses import boosted

OWN = {"fgsm_uap", "class_uap", "liet", "fgsm_pgi", "rs_cs"}  # methods with a loss of their own


def slow(logits: Tensor, shares: Tensor, smoothing: float = 0.0) -> Tensor:
    """One example after the other, from probabilities. shares: N x classes."""
    total = 0.0
    for z, row in zip(logits, shares.tolist(), strict=True):
        p = z.exp() / z.exp().sum()
        label = row.index(max(row))
        for c, share in enumerate(row):
            total = total - ((1 - smoothing) * share + smoothing / len(row)) * p[c].log()
        total = total - (1 - max(p[c] for c in range(len(row)) if c != label)).log()
    return total / len(logits)


def one_hot(y: Tensor, classes: int) -> Tensor:
    return F.one_hot(y, classes).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("kind", ["labels", "shares"])
def test_boosted_is_the_loss_written_out(kind, classes, smoothing):
    """Its value and its gradient, of hard labels and of mixed ones, of right and of wrong examples."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, classes, generator=generator, dtype=torch.float64)).requires_grad_()
    y = torch.randint(classes, (40,), generator=generator)
    assert 5 < (logits.argmax(1) == y).sum() < 35
    shares = one_hot(y, classes)
    if kind == "shares":
        amount = torch.rand(40, 1, generator=generator, dtype=torch.float64)
        shares = amount * shares + (1 - amount) * one_hot(y.roll(1), classes)
        assert 5 < (shares.argmax(1) == y).sum() < 35
    expected = slow(logits, shares, smoothing)
    found = boosted(logits, y if kind == "labels" else shares, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (gradient,), (reference,) = (torch.autograd.grad(loss, logits) for loss in (found, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-15)


def test_boosted_can_be_differentiated_twice():
    """As `gradalign` does."""
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradgradcheck(lambda z: boosted(z, y), logits)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("kind", ["labels", "shares"])
def test_boosted_of_confident_logits_is_finite(size, kind):
    """Right and sure of it, wrong and sure of it, two others alike, the label far below, all alike."""
    rows = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [-1.0, -1.0, 0.0], [1.0, 1.0, 1.0]]
    y, logits = torch.zeros(5, dtype=torch.int64), (size * torch.tensor(rows)).requires_grad_()
    found = boosted(logits, y if kind == "labels" else one_hot(y, 3).float())
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.isfinite() and gradient.isfinite().all()
    crosses = [0, size, size + math.log(2), size, math.log(3)]
    boosts = [0, size - math.log(2), math.log(2), size - math.log(2), math.log(3 / 2)]
    assert found.item() == pytest.approx((sum(boosts) + sum(crosses)) / 5, rel=1e-6)


def test_gradients_of_confident_examples_keep_their_digits():
    """In float32 a difference of two logsumexp would be 0 here."""
    exact = torch.tensor([[25.0, 0.0, 1.0, -3.0]], dtype=torch.float64)
    y, gradients = torch.tensor([0]), {}
    for dtype in (torch.float32, torch.float64):
        logits = exact.to(dtype).requires_grad_()
        term = boosted(logits, y) - F.cross_entropy(logits, y)
        (gradients[dtype],) = torch.autograd.grad(term, logits)
    assert 0 < gradients[torch.float64].abs().max() < 1e-10
    torch.testing.assert_close(gradients[torch.float32].double(), gradients[torch.float64], rtol=1e-5, atol=1e-17)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_boosted_is_in_update_and_attack(smoothing):
    model, reference = make_model(), make_model()
    x, y = make_batches(1)[0]
    of = lambda z: slow(reference(z).double(), one_hot(y, 4), smoothing)
    make = lambda model: Learner(model, sgd(), torch.tensor(RATES), loss="boosted", label_smoothing=smoothing)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of(leaf), leaf)
    gradient, _ = make(make_model()).input_gradient(x, y)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    make(model).update(x, y)
    reference.load_state_dict(make_model().state_dict())
    of(x).backward()
    torch.optim.SGD(reference.parameters(), lr=RATES[0], momentum=0.9, weight_decay=5e-4).step()
    same_weights(model, reference)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_without_the_key_the_loss_is_torchs_cross_entropy(smoothing):
    """To the bit, hard labels and mixed ones."""
    learner = on_noise(more={"label_smoothing": smoothing}).step.learner
    logits, y = torch.randn(16, 10, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 10
    for labels in (y, (one_hot(y, 10).float() + one_hot(y.roll(1), 10).float()) / 2):
        assert torch.equal(learner.loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=smoothing))


# ---- in the training of a config


def test_a_config_trains_with_the_loss_it_names():
    """Two steps: without the key as with `cross_entropy`, to the bit; with `boosted` the losses are higher."""
    usual, named, other = (
        run_steps(on_noise(more=more), 2) for more in ({}, {"loss": "cross_entropy"}, {"loss": "boosted"})
    )
    assert usual.losses == named.losses and usual.tensors.keys() == named.tensors.keys()
    assert all(torch.equal(t, named.tensors[name]) for name, t in usual.tensors.items())
    assert all(a < b for a, b in zip(usual.losses, other.losses, strict=True))
    name = next(name for name in usual.tensors if name.startswith("model.") and name.endswith("weight"))
    assert not torch.equal(usual.tensors[name], other.tensors[name])


def test_the_attack_of_a_config_climbs_the_loss_it_names():
    noise = on_noise(more={"loss": "boosted"})
    learner, batch = noise.step.learner, next(noise.batches(1))
    x = (batch.images.float() / 255).requires_grad_()
    (expected,) = torch.autograd.grad(slow(learner.forward(x).double(), one_hot(batch.labels, 10)), x)
    gradient, _ = learner.input_gradient(x, batch.labels)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", sorted(STEP_METHODS))
def test_no_method_ignores_the_loss(name):
    """It is higher in the first update, on the same noise, or the method refuses the key."""
    method = STEP_METHODS[name]
    assert {m["name"] for m in STEP_METHODS.values()} == parts.METHODS.keys()
    if method.get("of", method)["name"] in OWN:
        with pytest.raises(ConfigError, match=r"loss is boosted, but this method has a loss of its own"):
            on_noise(name, more={"loss": "boosted"})
        return
    usual, other = (run_steps(on_noise(name, more={"loss": loss}), 1).losses[0] for loss in ("cross_entropy", "boosted"))
    assert other > usual


def test_mixed_images_are_trained_on_with_it():
    more = {"loss": "boosted", "data": {"dataset": "image_folder", "augment": {"mixup": 1.0}}}
    assert all(math.isfinite(loss) for loss in run_steps(on_noise(more=more), 2).losses)


def test_another_loss_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"loss: .*boosted"):
        reading.parse(settings(tmp_path, loss="hinge"), "test")
