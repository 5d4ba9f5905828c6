"""The L2 ball against closed forms, slow versions and torchattacks; targeted PGD against a slow version and brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.attack import gradient
from fastrobust.attack.base import Setting, parse
from fastrobust.attack.pgd import attack, packed, pgd
from fastrobust.attack.pgd_targeted import PgdT
from fastrobust.attack.rounds import run_rounds
from fastrobust.attack.threat import L2, Threat, ball, l2_norm
from fastrobust.attack.verdicts import breaks, check_images
from fastrobust.runtime.errors import ConfigError, DataError
from fastrobust.runtime.torchvision_compat import import_torchvision


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random pixels, some of them saturated at 0 or 1."""
    return (numbers(*shape, seed=seed) * 0.6 + 0.5).clamp(0, 1)


def length(delta) -> list[float]:
    return [math.sqrt(math.fsum(v * v for v in row)) for row in delta.flatten(1).tolist()]


class Doubled(nn.Module):
    """Computed in fp64: rounding that depends on how images are batched cannot turn a verdict."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers).double().eval().requires_grad_(False)

    def forward(self, x):
        return self.layers(x.double())


def network(classes: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return Doubled(nn.Flatten(), nn.Linear(2 * 6 * 6, 16), nn.ReLU(), nn.Linear(16, classes))


# ---- the ball


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, torch.tensor(0.5)])
def test_projection_is_scaling_then_clipping_and_ends_in_ball_and_box(epsilon):
    x, delta = images(6, 2, 5, 4), numbers(6, 2, 5, 4, seed=1) * torch.tensor([0.01, 0.1, 0.3, 1, 9, 0])[:, None, None, None]
    found = L2(epsilon).project(delta, x)
    for d, p, q, norm in zip(delta, x, found, length(delta), strict=True):
        factor = min(1.0, float(epsilon) / norm) if norm else 1.0
        expected = [min(max(v * factor, -u), 1 - u) for v, u in zip(d.flatten().tolist(), p.flatten().tolist(), strict=True)]
        torch.testing.assert_close(q.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert max(length(found)) <= float(epsilon) + 1e-6
    assert (x + found).min() >= 0 and (x + found).max() <= 1
    assert L2(epsilon).contains(x + found, x, 1e-6).all()


def test_what_lies_inside_is_left_alone():
    x = torch.full((2, 2, 5, 4), 0.5)
    delta = 0.01 * numbers(2, 2, 5, 4)
    assert torch.equal(L2(0.5).project(delta, x), delta)


@pytest.mark.parametrize("clip", [True, False])
def test_starts_are_uniform_in_the_ball(clip):
    """The share of a ball of d dimensions within r is r ** d: so (distance / radius) ** d is uniform, and so is the sign."""
    torch.manual_seed(0)
    x, radius, d = torch.full((20_000, 1, 2, 2), 0.5), 0.25, 4
    for delta in (L2(radius).start(x, clip), L2(radius).noise(x.shape, torch.Generator().manual_seed(1))):
        share = (l2_norm(delta).flatten() / radius).double() ** d
        assert share.max() <= 1 + 1e-5
        uniform = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        assert (share.sort().values - uniform).abs().max() < 1.95 / math.sqrt(len(x))  # Kolmogorov-Smirnov at 0.1 %
        moments = delta.flatten(1).T @ delta.flatten(1) / len(x)
        torch.testing.assert_close(moments, torch.eye(d) * radius**2 / (d + 2), rtol=0, atol=4e-4)
        assert delta.flatten(1).mean(0).abs().max() < 0.005


def test_clipped_starts_are_in_the_box_and_noise_is_the_generators():
    x = images(40, 3, 8, 8)
    start = L2(3.0).start(x)
    assert (x + start).min() >= 0 and (x + start).max() <= 1 and max(length(start)) <= 3 + 1e-5
    assert (x + L2(3.0).start(x, clip=False)).min() < 0
    one, same, other = (L2(0.5).noise((40, 3, 8, 8), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_a_step_has_length_alpha_along_the_gradient_however_small(size):
    delta, way = 0.1 * numbers(3, 2, 5, 4), numbers(3, 2, 5, 4, seed=1)
    way[2] = 0
    found = L2(1.0).step(delta, way * size, 0.25) - delta
    assert length(found) == pytest.approx([0.25, 0.25, 0], abs=1e-6)
    for i, norm in enumerate(length(way)[:2]):
        torch.testing.assert_close(found[i], 0.25 * way[i] / norm, rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_does_not_spoil_a_step():
    way = torch.zeros(2, 1, 1, 3)
    way[0, 0, 0], way[1, 0, 0] = torch.tensor([math.nan, 3.0, 4.0]), torch.tensor([math.inf, 1.0, math.nan])
    found = L2(1.0).step(torch.zeros_like(way), way, 1.0).flatten(1)
    torch.testing.assert_close(found, torch.tensor([[0, 0.6, 0.8], [1.0, 0, 0]]), rtol=0, atol=1e-6)


def test_points_outside_of_ball_or_box_are_refused_and_near_ones_moved_in():
    x = torch.full((4, 3, 224, 224), 0.5)
    way = numbers(4, 3, 224, 224, seed=2)
    way /= l2_norm(way)
    three = L2(3.0)
    assert three.contains(x + three.project(9 * way, x), x, 1e-6).all()  # 150,000 pixels in fp32
    assert not three.contains(x + (3 + 1e-4) * way, x, 1e-6).any()
    assert length(three.nearest(x + 9 * way, x).double() - x) == pytest.approx([3.0] * 4, abs=1e-6)
    outside = x.clone()
    outside[:, 0, 0, 0] = 1 + 1e-4
    assert not three.contains(outside, x, 1e-6).any() and three.nearest(outside, x).max() <= 1
    assert not three.contains(x * math.nan, x, 1.0).any()


def test_the_balls_are_told_apart_and_found_by_name():
    assert ball("l2", 0.5) == L2(0.5) != Threat(0.5) and ball("linf", 0.5) == Threat(0.5)
    assert L2(0.5).scaled(0.5) == L2(0.25)
    own = {"project", "start", "noise", "step", "box", "nearest", "contains", "widest", "norm"}
    assert own <= vars(L2).keys()  # nothing is L-infinity's by oversight
    with pytest.raises(ConfigError, match="L-infinity ball alone"):
        L2(0.5).box(images(1, 1, 2, 2))
    for norm, told in (("l1", "'l1' is not one of linf, l2$"), ("L2", r"'L2' is not one of linf, l2; did you mean 'l2'\?$")):
        with pytest.raises(ConfigError, match=f"norm: {told}"):
            ball(norm, 0.5)


def test_radii_up_to_the_boxs_diagonal_are_taken():
    x, y = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    check_images(x, y, L2(4.0))
    with pytest.raises(DataError, match="outside 0 to 4; did you mean 128/255"):
        check_images(x, y, L2(128.0))


# ---- attacks


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_a_linear_model_is_broken_exactly_where_its_closed_form_says(epsilon):
    """Two classes: their logits' difference changes by at most epsilon ||w_1 - w_0||, and PGD gets there in a straight line.
    The images are further from the box than epsilon."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 2)
    x = 0.5 + 0.01 * numbers(200, 3, 4, 4, seed=1)
    with torch.no_grad():
        w = linear.weight[1] - linear.weight[0]
        along = (x.flatten(1) - 0.5) @ w / w.norm()  # distance from the plane through the grey image
        linear.bias[1] = linear.bias[0] - 0.5 * w.sum()
    x = x + (numbers(200, seed=2) * epsilon - along)[:, None, None, None] * (w / w.norm()).view(1, 3, 4, 4)
    model = Doubled(nn.Flatten(), linear)
    logits = model(x)
    distance = (logits[:, 1] - logits[:, 0]).abs() / w.double().norm()
    found = pgd(model, x, logits.argmax(1), threat=L2(epsilon), alpha=epsilon / 4, steps=12, restarts=1)
    clear = (distance - epsilon).abs() > 1e-3 * epsilon
    assert torch.equal(found.robust[clear], (distance > epsilon)[clear])
    assert 40 < found.robust.sum() < 160 and clear.sum() > 190


def test_pgd_takes_torchattacks_steps_from_torchattacks_start():
    import_torchvision()
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = network(), images(30, 2, 6, 6), torch.arange(30) % 5
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=7, random_start=False)(x, y)
    mine = x + gradient.ascend(model, x, y, torch.zeros_like(x), L2(0.5), 0.2, 7)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
    assert (mine - x).abs().max() > 0.05


def test_verdicts_equal_those_of_a_slow_pgd():
    model, x = network(), images(80, 2, 6, 6)
    y = model(x).argmax(1)
    epsilon, alpha, threat = 0.4, 0.1, L2(0.4)
    expected = torch.ones(80, dtype=torch.bool)
    for restart in range(2):
        ((_, start),) = packed(x, expected | True, threat, 80, (0, restart))
        for i in range(80):
            d = torch.minimum(torch.maximum(start[i], -x[i]), 1 - x[i])
            for step in range(6):
                z = (x[i] + d).requires_grad_()
                logits = model(z[None])
                expected[i] &= bool(logits.argmax() == y[i])
                if step < 5:
                    (g,) = torch.autograd.grad(F.cross_entropy(logits, y[i : i + 1]), z)
                    d = d + alpha * g / math.sqrt(float((g * g).sum()))
                    d = d * min(1.0, epsilon / math.sqrt(float((d * d).sum())))
                    d = torch.minimum(torch.maximum(d, -x[i]), 1 - x[i])
    found = pgd(model, x, y, threat=threat, alpha=alpha, steps=5, restarts=2, batch_size=32)
    assert torch.equal(found.robust, expected) and 5 < expected.sum() < 75


def robust_under(kind, model, x, y, threat, numbers, alpha) -> torch.Tensor:
    robust = torch.ones(len(x), dtype=torch.bool)
    run_rounds(kind(Setting(model, x, threat, alpha, 16, 0), numbers), x, y, robust, threat=threat)
    return robust


@pytest.mark.parametrize("threat", [Threat(0.04), L2(0.3)], ids=["linf", "l2"])
def test_targeted_pgd_breaks_what_runs_towards_each_target_break(threat):
    """The oracle runs one image after the other, towards each wrong class, with the same starts."""
    model, x = network(), images(60, 2, 6, 6)
    y, alpha, steps = model(x).argmax(1), threat.radius / 4, 8
    expected = torch.ones(60, dtype=torch.bool)
    starts = [next(packed(x, expected | True, threat, 60, (0, number)))[1] for number in range(4)]
    for i in range(60):
        order = [c for c in model(x[i : i + 1])[0].argsort(descending=True).tolist() if c != y[i]]
        for rank, target in enumerate(order):
            z, delta = x[i : i + 1], threat.clip(starts[rank][i : i + 1], x[i : i + 1])
            for _ in range(steps + 1):
                point = (z + delta).requires_grad_()
                logits = model(point)
                expected[i] &= bool(logits.argmax() == y[i])
                (g,) = torch.autograd.grad(logits[0, target] - logits[0, y[i]], point)
                delta = threat.project(threat.step(delta, g, alpha), z)
    found = robust_under(PgdT, model, x, y, threat, (steps, 1), alpha)
    assert torch.equal(found, expected) and 5 < expected.sum() < 55
    survived, points = PgdT(Setting(model, x, threat, alpha, 60, 0), (steps, 1)).run(x, y, (starts[0], 0))
    assert torch.equal(breaks(model, x, y, points, threat), ~survived) and (~survived).any()


def test_targeted_pgd_reaches_a_class_that_the_gradient_of_the_likeliest_hides():
    """In a plane of two pixels the second class is nearest by logits and out of reach; the third is in reach, the other way.
    The brute force over a grid of the ball says so."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x):
            u = x.flatten(1)[:, 0] - 0.5
            return torch.stack([torch.zeros_like(u), (4 * u - 0.05).clamp(max=-0.01), -3 * u - 0.1], 1)

    model, x, y = Three(), torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    threat = L2(0.1)
    grid = torch.cartesian_prod(*[torch.linspace(-0.1, 0.1, 81)] * 2)
    grid = grid[grid.norm(dim=1) <= 0.1]
    broken = model(x + grid.view(-1, 1, 1, 2)).argmax(1)
    assert set(broken.tolist()) == {0, 2}
    start = torch.full_like(x, 0.01)
    assert attack(model, x, y, start, threat=threat, alpha=0.02, steps=20).all()  # up the likeliest class, and stays there
    assert not robust_under(PgdT, model, x, y, threat, (20, 1), 0.02).any()


def test_targeted_pgd_has_nine_targets_at_most_and_a_name():
    assert parse("pgd-t-50-2") == (PgdT, (50, 2))
    x = images(2, 2, 6, 6)
    for classes, targets in ((2, 1), (5, 4), (30, 9)):
        assert PgdT(Setting(network(classes), x, Threat(0.1), 0.1, 2, 0), (5, 3)).rounds == 3 * targets
    for name in ("pgd-t-50", "pgd-t", "pgd-t-0-1"):
        with pytest.raises(ConfigError, match="pgd-t-STEPS-RESTARTS"):
            parse(name)
