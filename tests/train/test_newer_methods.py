"""Tests of the methods after the paper: a few steps of each against the same written out from its paper, with plain
`backward` calls, masks and loops. The network has BatchNorm. Weights, running averages and states agree to 1e-5."""

import copy

import pytest
import torch
from method_steps import section
from slow_methods import (
    CLASSES,
    EPOCHS,
    EPSILON,
    EXAMPLES,
    N,
    Run,
    Slow,
    agree,
    ball,
    batches,
    entropy,
    smooth,
    targets,
    uniform,
)
from torch import Tensor

from fastrobust.train.methods.base import Shapes
from fastrobust.train.methods.gradalign import cosine
from fastrobust.train.methods.n_aaer import against_abnormal

# ---- TRADES


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((a * (a / b).log()).sum() for a, b in zip(p, q, strict=True)) / len(p)


def slow_trades_attack(slow: Slow, x: Tensor, steps: int) -> Tensor:
    slow.model.eval()
    p = slow.model(x).softmax(1).detach()
    point = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        g, _ = slow.gradient(point, lambda z: kl(p, z.softmax(1)))
        point = (x + ball(point - x + EPSILON / 4 * g.sign())).clamp(0, 1)
    slow.model.train()
    return point


def test_trades():
    run, slow = Run("trades", steps=3, beta=2), Slow()
    for x, y, _ in batches(3):
        point = slow_trades_attack(slow, x, 3)
        z, clean = slow.model(point), slow.model(x)
        slow.update(smooth(clean, y, 0) + 2 * kl(clean.softmax(1), z.softmax(1)))
    agree(run.steps(3), slow)


# ---- N-AAER


def abnormal_loss(at_start: Tensor, z: Tensor, y: Tensor, weights: tuple[float, float]) -> tuple[Tensor, int, bool]:
    """As published, with masks. Also how many are abnormal, and whether their logits moved more than the others'."""
    before, after = (torch.stack([smooth(a[None], b[None], 0) for a, b in zip(t, y, strict=True)]) for t in (at_start, z))
    abnormal = before > after
    if not 0 < abnormal.sum() < len(y):
        return after.mean(), int(abnormal.sum()), False
    changes = ((z - at_start) ** 2).sum(1)
    difference = changes[abnormal].mean() - changes[~abnormal].mean().item()
    term = weights[0] * (before - after)[abnormal].mean() + weights[1] * max(difference, 0 * difference)
    return after.mean() + abnormal.sum() / len(y) * term, int(abnormal.sum()), bool(difference > 0)


def test_n_aaer():
    run, slow, found = Run("n_aaer", alpha=1, noise=5), Slow(), 0
    for x, y, _ in batches(4):
        start = (x + uniform(x, 5 * EPSILON)).clamp(0, 1)
        g, at_start = slow.gradient(start, lambda z, y=y: smooth(z, y, 0))
        z = slow.model((start + g.sign()).clamp(0, 1))
        loss, count, _ = abnormal_loss(at_start.detach(), z, y, (1.5, 0.15))
        slow.update(loss)
        found += count
    agree(run.steps(4), slow)
    assert found


def test_abnormal_examples():
    """Many, none, and nothing but them; with logits that moved more than the others', and less."""
    learner, seen = Run("n_aaer").learner, set()
    for seed in range(12):
        torch.manual_seed(seed)
        y = torch.randint(CLASSES, (N,))
        at_start, z = torch.randn(N, CLASSES), torch.randn(N, CLASSES, requires_grad=True)
        if seed < 2:
            z.data = at_start.clone()
            z.data[torch.arange(N), y] += seed * 2 - 1
        expected, count, larger = abnormal_loss(at_start, z, y, (1.5, 0.15))
        found = against_abnormal(at_start, learner, 1.0, 1.5, 0.15)(z, y)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))
        seen |= {(count in (0, N), larger), count}
    assert {(True, False), (False, True), (False, False), 0, N} <= seen


# ---- FGSM-RS-CS


def test_rs_cs():
    """Of four epochs the third is the one in which the loss is steadied; the means are those of the epoch before."""
    run, slow, means, added = Run("rs_cs", threshold=0.01), Slow(), {}, []
    for step, (x, y, _) in enumerate(batches(8)):
        epoch = int(EPOCHS[step])
        start = (x + uniform(x, EPSILON)).clamp(0, 1)
        g, at_start = slow.gradient(start, lambda z, y=y: smooth(z, y))
        soft = 0.6 * targets(y, 0.6) + 0.4 / CLASSES
        z, at_start = slow.model((start + EPSILON * g.sign()).clamp(0, 1)), entropy(at_start, soft)
        loss = entropy(z, soft)
        means.setdefault(epoch, []).append(at_start.item())
        if 2 <= epoch <= 4 - 2:
            distance = at_start.item() - sum(means[epoch - 1]) / 2
            if abs(distance) > 0.01:
                loss = loss + at_start if distance > 0 else loss - at_start
                added.append(distance)
        slow.update(loss)
    agree(run.steps(8), slow)
    assert added and run.state["epoch"] == 3
    torch.testing.assert_close(run.state["last"].item(), sum(means[2]) / 2)


# ---- GradAlign


def test_gradalign():
    run, slow = Run("gradalign", weight=2), Slow()
    for x, y, _ in batches(3):
        g, _ = slow.gradient(x, lambda z, y=y: smooth(z, y, 0))
        other = (x + uniform(x, EPSILON)).clamp(0, 1).requires_grad_()
        (h,) = torch.autograd.grad(smooth(slow.model(other), y, 0), other, create_graph=True)
        z = slow.model((x + EPSILON * g.sign()).clamp(0, 1))
        cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(g, h, strict=True)]
        slow.update(smooth(z, y, 0) + 2 * (1 - sum(cosines) / N))
    agree(run.steps(3), slow)
    assert min(cosines) < 0.99


@pytest.mark.parametrize(("epsilon", "weight"), [(4 / 255, 0.02 * 10**0.5), (8 / 255, 0.2), (16 / 255, 2.0), (0.1, 2.0)])
def test_the_weight_of_gradalign_by_epsilon(epsilon, weight):
    assert section("gradalign", epsilon).weight == pytest.approx(weight)


def test_gradalign_leaves_out_examples_without_gradient():
    run = Run("gradalign")
    a, b = torch.rand(4, 1, 6, 6), torch.rand(4, 1, 6, 6)
    a[1] = b[2] = 0
    expected = [torch.cosine_similarity(a[k].flatten(), b[k].flatten(), dim=0) for k in (0, 3)]
    torch.testing.assert_close(cosine(a, b, run.learner), sum(expected) / 2)


# ---- SORA


def test_sora():
    run, slow, v = Run("sora"), Slow(), 0.99
    for x, y, _ in batches(4):
        start = (x + uniform(x, EPSILON)).clamp(0, 1)
        g, _ = slow.gradient(start, lambda z, y=y: smooth(z, y, 0))
        alpha = 2 * EPSILON * min(1, 0.02 / (1 - v))
        end = (start + alpha * torch.rand_like(x) * g.sign()).clamp(0, 1).requires_grad_()
        slow.update(smooth(slow.model(end), y, 0))
        along = [(a.sign() * b).sum().item() / a.abs().sum().item() for a, b in zip(g, end.grad, strict=True)]
        v = 0.95 * v + 0.05 * max(-1, min(1, sum(along) / N))
    agree(run.steps(4), slow)
    assert run.state["agreement"].item() == pytest.approx(v, abs=1e-5) and v < 0.98


# ---- AWP


def slow_awp(slow: Slow, gamma: float, loss_of) -> None:
    """The published way: a copy of the model finds the direction, the weights go there, and are put back."""
    proxy = copy.deepcopy(slow.model)
    loss_of(proxy).backward()
    moves = []
    for p, q in zip(slow.model.parameters(), proxy.parameters(), strict=True):
        moves.append(gamma * q.detach().norm() * q.grad / q.grad.norm() if p.dim() > 1 else torch.zeros_like(p))
        p.data += moves[-1]
    slow.optimizer.zero_grad()
    loss_of(slow.model).backward()
    for p, move in zip(slow.model.parameters(), moves, strict=True):
        p.data -= move
    slow.optimizer.step()


def test_awp_around_trades():
    run, slow = Run("awp", of={"name": "trades", "steps": 2}, begin=0.2, gamma=0.05), Slow()
    for step, (x, y, _) in enumerate(batches(4)):
        point = slow_trades_attack(slow, x, 2)

        def loss_of(model, x=x, y=y, point=point):
            z, clean = model(point), model(x)
            return smooth(clean, y, 0) + 6 * kl(clean.softmax(1), z.softmax(1))

        slow_awp(slow, 0.05 if EPOCHS[step] >= 0.2 * 4 else 0, loss_of)
    agree(run.steps(4), slow)


def test_awp_around_a_method_whose_update_reaches_back_to_the_start():
    """The direction is found with the logits at the start as they are; the update's gradient goes through both."""
    run, slow = Run("awp", of={"name": "fgsm_uap"}, begin=0), Slow()
    u = run.first["u"] * 1.25 * EPSILON
    ((x, y, _),) = batches(1)
    start = (x + ball(u)).clamp(0, 1)
    g, at_start = slow.gradient(start, lambda z: smooth(z, y))
    end = (x + ball(start - x + EPSILON * g.sign())).clamp(0, 1)
    weights = dict(slow.model.named_parameters())
    proxy = copy.deepcopy(slow.model)
    (smooth(z := proxy(end), y) + 10 * ((z - at_start.detach()) ** 2).mean()).backward()
    moved = {
        name: weights[name] + 0.01 * p.detach().norm() * p.grad / p.grad.norm()
        for name, p in proxy.named_parameters()
        if p.dim() > 1
    }
    z = torch.func.functional_call(slow.model, moved, end)
    slow.update(smooth(z, y) + 10 * ((z - at_start) ** 2).mean())
    agree(run.steps(1), slow)


@pytest.mark.parametrize(("of", "gamma"), [("trades", 0.005), ("fgsm", 0.01)])
def test_awp_has_the_properties_of_what_it_is_around(of, gamma):
    awp, alone = section("awp", of={"name": of}), section(of)
    assert (awp.gamma, awp.batchnorm_in_attack, awp.of.alpha) == (gamma, alone.batchnorm_in_attack, alone.alpha)
    assert section("awp", of={"name": "free", "replays": 3}).updates_per_batch == 3
    assert section("awp", of={"name": "free"}).by_slot == ("delta",)
    assert not section("awp", of={"name": "standard"}).attacks
    assert awp.describe().endswith(f"of {alone.describe()}")
    run = Run("awp", of={"name": of}).steps(1)
    assert run.learner.moved is None


# ---- what holds for all of them

ALL = {
    "fgsm_uap": {"alpha": 0.1},
    "class_uap": {"alpha": 0.1},
    "liet": {"noise": 1, "project": True, "noisy": [0, 1], "consistency": 3, "label_smoothing": 0.1},
    "fgsm_pgi": {},
    "trades": {"alpha": 0.1, "steps": 2},
    "n_aaer": {"alpha": 0.1},
    "rs_cs": {"alpha": 0.1},
    "gradalign": {"weight": 1},
    "sora": {"alpha": 0.1},
    "awp": {"of": {"name": "n_fgsm", "alpha": 0.1}},
}


@pytest.mark.parametrize("name", ALL)
def test_the_scale_multiplies_epsilon_and_alpha(name):
    """At a scale of 1/4 as in a config with a quarter of epsilon and alpha."""
    smaller = ALL[name] | ({"alpha": 0.025} if "alpha" in ALL[name] else {})
    smaller |= {"of": {"name": "n_fgsm", "alpha": 0.025}} if name == "awp" else {}
    runs = Run(name, 0.1, **ALL[name]).steps(2, torch.tensor(0.25)), Run(name, 0.025, **smaller).steps(2)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_state_is_written_in_place_and_inputs_are_not_written_to(name):
    run = Run(name, **ALL[name])
    assert set(run.state) == set(run.method.agreed)
    before = {key: t.data_ptr() for key, t in run.state.items()}
    (batch,) = batches(1)
    copies = [t.clone() for t in batch]
    run.method.step(run.learner, batch, run.threat, 1.0, run.state)
    assert {key: t.data_ptr() for key, t in run.state.items()} == before
    assert all(torch.equal(a, b) for a, b in zip(batch, copies, strict=True))
    assert all(not torch.equal(t, run.first[key]) for key, t in run.state.items() if key not in ("epoch", "last"))


@pytest.mark.parametrize("name", ["fgsm_uap", "class_uap", "fgsm_pgi", "liet", "sora"])
def test_a_gradient_that_overflowed_leaves_the_state_healthy(name):
    """As fp16's can: the update is skipped, and later steps find a direction again."""
    run = Run(name)
    hook = run.model[4].register_full_backward_pre_hook(lambda module, gradient: (gradient[0] * float("inf"),))
    weights = {key: t.clone() for key, t in run.model.state_dict().items()}
    run.steps(1)
    hook.remove()
    run.model.load_state_dict(weights)
    run.steps(2)
    assert all(t.isfinite().all() for t in run.state.values())


def test_the_first_signs_are_those_of_the_seed():
    shapes = [Shapes((N, 1, 6, 6), CLASSES, EXAMPLES, torch.device("cpu"), seed) for seed in (1, 1, 2)]
    torch.manual_seed(7)
    first, again, other = (section("class_uap").state(s)["u"] for s in shapes)
    assert torch.equal(first, again) and not torch.equal(first, other)
