"""Bounds of exact verification against oracles: sampled points, a slow relaxation in extended precision, linear programs."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from small_networks import SHAPE, images, program, rows_at, scaled, tiny

from fastrobust.verification import bounds, branch, network
from fastrobust.verification.decide import Decider
from fastrobust.verification.narrowing import local, narrow, renew


def corners(decider: Decider, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((x.double() + s * decider.epsilon).clamp(0, 1).flatten() for s in (-1, 1))


def inside(network, points: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of every ReLU, slowly: N x values each."""
    found, values = [], [points.numpy()]
    for relu in network.relus:
        z = relu.shift + sum(values[s] @ weight.toarray().T for s, weight in relu.parts.items())
        found.append(torch.from_numpy(z))
        values.append(z.clip(min=0))
    return found


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_bounds_contain_sampled_points_and_are_never_looser_than_intervals(steps, epsilon):
    decider = Decider(tiny(1), SHAPE, epsilon)
    x = images(1)[0].float() / 255
    low, high = corners(decider, x)
    around = bounds.surround(decider.network, (low, high), steps)
    unit = torch.rand(10_000, len(low), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit[::2] = unit[::2].round()  # every second one a corner
    points = low + (high - low) * unit
    ends = [(low.numpy(), high.numpy())]
    for k, values in enumerate(inside(decider.network, points)):
        relu, (lower, upper) = decider.network.relus[k], ends[k]
        plain_low, plain_high = relu.interval(ends)
        weight = relu.parts[k].toarray()
        slow_low = weight.clip(min=0) @ lower + weight.clip(max=0) @ upper + relu.shift
        assert np.allclose(plain_low, slow_low, rtol=0, atol=1e-8) and (plain_low <= slow_low).all()
        assert (values.numpy() >= plain_low).all() and (values.numpy() <= plain_high).all()
        ends.append((plain_low.clip(min=0), plain_high.clip(min=0)))

        layer = around.layers[k]
        mine_low, mine_high = around.lower[layer].numpy(), around.upper[layer].numpy()
        # the unstable ones are found again by their values: the reduced network's rows at the sampled points
        r = torch.cat([values_of.clamp(min=0) for values_of in rows_at(around, points)], 1)
        z = rows_at(around, points)[k]
        assert r.shape[1] == len(around.lower)
        assert (z.numpy() >= mine_low).all() and (z.numpy() <= mine_high).all()
        index = [int((values - z[:, j : j + 1]).abs().max(0).values.argmin()) for j in range(z.shape[1])]
        assert all((values[:, i] - z[:, j]).abs().max() < 1e-9 for j, i in enumerate(index))
        assert (mine_low >= plain_low[index] - 1e-8).all() and (mine_high <= plain_high[index] + 1e-8).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_reduced_network_is_the_network_inside_its_box(seed):
    decider = Decider(tiny(seed), SHAPE, 0.1)
    x = images(1, seed)[0].float() / 255
    label = torch.tensor(1)
    least, bounder, questions = decider.margins(x, label, 0)
    low, high = corners(decider, x)
    points = low + (high - low) * torch.rand(200, len(low), dtype=torch.float64)
    z = rows_at(bounder.reduced, points)
    known = torch.cat(
        [scaled(bounder.reduced, points), torch.ones(200, 1, dtype=torch.float64), *(t.clamp(min=0) for t in z)], 1
    )
    logits = decider.network(points)
    margins = logits[:, 1:2] - logits[:, [0, 2]]
    assert torch.allclose(known @ questions.T, margins, rtol=0, atol=1e-10)
    assert (margins >= least).all()


@pytest.mark.parametrize("seed", range(4))
def test_unoptimised_bounds_are_those_of_a_slow_relaxation_in_extended_precision(seed):
    """Dense matrices of the whole network, one row at a time, numpy's long double: also what double precision loses."""
    decider = Decider(tiny(seed), SHAPE, 0.1)
    x = images(1, seed)[0].float() / 255
    least, bounder, _ = decider.margins(x, torch.tensor(2), 0)
    long = np.longdouble
    sums = [*decider.network.relus, decider.network.outputs]
    weights = [z.parts[k].toarray().astype(long) for k, z in enumerate(sums)]
    shifts = [z.shift.astype(long) for z in sums]
    low, high = (side.numpy().astype(long) for side in corners(decider, x))

    def below(row, total, k, hidden):
        for i in range(k - 1, -1, -1):
            lower, upper = hidden[i]
            made = np.zeros_like(row)
            for j, coefficient in enumerate(row):
                low_z, high_z = lower[j], upper[j]
                if low_z >= 0:
                    made[j] = coefficient
                elif high_z > 0 and coefficient < 0:
                    made[j] = coefficient * high_z / (high_z - low_z)
                    total -= coefficient * high_z * low_z / (high_z - low_z)
                elif high_z > 0 and high_z > -low_z:
                    made[j] = coefficient
            total += made @ shifts[i]
            row = made @ weights[i]
        return total + np.where(row > 0, row * low, row * high).sum()

    hidden, inputs = [], (low, high)
    widen = long(network.ROUNDING)
    for k in range(len(weights) - 1):
        centre, radius = (inputs[0] + inputs[1]) / 2, (inputs[1] - inputs[0]) / 2
        centre, radius = weights[k] @ centre + shifts[k], abs(weights[k]) @ radius + widen
        lower, upper = centre - radius, centre + radius
        if k > 0:
            for j in np.flatnonzero((lower < 0) & (upper > 0)):
                lower[j] = max(lower[j], below(weights[k][j], shifts[k][j], k, hidden) - widen)
                upper[j] = min(upper[j], -below(-weights[k][j], -shifts[k][j], k, hidden) + widen)
        hidden.append((lower, upper))
        inputs = (lower.clip(min=0), upper.clip(min=0))
    for value, other in zip(least, (0, 1), strict=True):
        row, shift = weights[-1][2] - weights[-1][other], shifts[-1][2] - shifts[-1][other]
        assert abs(below(row, shift, len(weights) - 1, hidden) - long(value.item())) < 1e-11
    assert bounder.reduced.lower.numel() > 5  # there was something to relax


@pytest.mark.parametrize("seed", range(3))
def test_optimised_slopes_reach_the_linear_program_and_never_pass_it(seed):
    decider = Decider(tiny(seed), SHAPE, 0.05)
    x = images(1, seed)[0].float() / 255
    plain, bounder, questions = decider.margins(x, torch.tensor(0), 0)
    optimised = bounder.tighten(bounder.root(questions), 150).bound
    for before, after, question in zip(plain, optimised, questions, strict=True):
        exact = program(bounder.reduced, question)
        assert before <= after <= exact + 1e-9
        assert exact - after < 0.02 * max(1.0, exact - before.item())


def partly_fixed(bounder, question: torch.Tensor, point: torch.Tensor, seed: int) -> bounds.Domains:
    """A domain in which a third of the signs are fixed as they are at a point (1 x D), slopes and multipliers at random."""
    generator = torch.Generator().manual_seed(seed)
    domains = bounder.root(question[None])
    signs = torch.cat(rows_at(bounder.reduced, bounder.reduced.images(point)), 1).sign().to(torch.int8)
    domains.signs = signs * (torch.rand(signs.shape, generator=generator) < 1 / 3)
    domains.low = torch.rand(signs.shape, generator=generator)
    domains.push = torch.rand(signs.shape, generator=generator) * 0.1
    return domains


@pytest.mark.parametrize("seed", range(3))
def test_where_a_relaxation_is_least_gives_its_value_and_its_slopes(seed):
    decider = Decider(tiny(seed), SHAPE, 0.1)
    _, bounder, questions = decider.margins(images(1, seed)[0].float() / 255, torch.tensor(0), 0)
    domains = partly_fixed(bounder, questions[0], torch.rand(1, bounder.reduced.inputs, dtype=torch.float64) * 2 - 1, seed)
    domains.ends[0, ::3] = 1
    double = lambda low: bounder.lines(domains, low, torch.float64)
    low, push = domains.low.double(), domains.push.double()
    value, coefficients, x = bounder.below(questions[:1], double(low), push)
    known, z = bounder.point(double(low), coefficients, x)
    assert value.item() == pytest.approx((known @ questions[0] - (push * domains.signs * z).sum(1)).item(), abs=1e-9)
    by_low = coefficients.clamp(min=0) * z * (domains.signs == 0)
    by_push = -domains.signs * z
    change = lambda low, push: (bounder.below(questions[:1], double(low), push)[0] - value).item()
    for j in range(len(bounder.reduced.lower)):
        step = torch.zeros_like(low)
        step[0, j] = 1e-7
        assert change(low + step, push) == pytest.approx(by_low[0, j].item() * 1e-7, abs=1e-11)
        assert change(low, push + step) == pytest.approx(by_push[0, j].item() * 1e-7, abs=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_bounds_renewed_in_a_domain_hold_wherever_its_row_is_small_there(seed):
    decider = Decider(tiny(seed), SHAPE, 0.1)
    _, bounder, questions = decider.margins(images(1, seed)[0].float() / 255, torch.tensor(seed % 3), 0)
    around = bounder.reduced
    points = torch.rand(20_000, around.inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    points[::2] = points[::2].sign()
    z = rows_at(around, around.images(points))
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    margins = torch.cat([points, ones, *(t.clamp(min=0) for t in z)], 1) @ questions[0]
    least = margins.argmin()
    tolerance = margins.sort().values[200].item()
    for domains in (bounder.root(questions[:1]), partly_fixed(bounder, questions[0], points[least : least + 1], seed)):
        renewed = bounder.rebound(domains, tolerance, 20)
        here = ((torch.cat(z, 1) * domains.signs >= 0).all(1)) & (margins <= tolerance)
        assert here.any() and renewed.bound.item() < torch.inf
        mine = z[-1][here]
        span, before = renewed.span[0, :, bounder.last], domains.span[0, :, bounder.last]
        assert (mine >= span[0]).all() and (mine <= span[1]).all()
        fixed = renewed.signs[:, bounder.last]
        assert (mine * fixed >= 0).all() and (fixed * domains.signs[:, bounder.last] >= 0).all()
        assert (span[0] >= before[0]).all() and (span[1] <= before[1]).all()

        tighter = renew(bounder, domains, tolerance)
        mine = torch.cat(z, 1)[here]
        assert (mine >= tighter.span[0, 0]).all() and (mine <= tighter.span[0, 1]).all()


@pytest.mark.parametrize("seed", range(3))
def test_no_input_of_a_relu_gets_further_than_the_room_around_a_corner_allows(seed):
    _, bounder, questions = Decider(tiny(seed), SHAPE, 0.1).margins(images(1, seed)[0].float() / 255, torch.tensor(0), 0)
    around, generator = bounder.reduced, torch.Generator().manual_seed(seed)
    cost = torch.rand(1, around.inputs, generator=generator, dtype=torch.float64) - 0.5
    away = torch.rand(20_000, around.inputs, generator=generator, dtype=torch.float64) * 2  # from the corner
    away[::2] = (away[::2] > 1.9) * 2.0
    spent = away @ cost[0].abs()
    room = spent.sort().values[2000:2001]
    points = (away[spent <= room] - 1) * cost.sign()
    z = torch.cat(rows_at(around, around.images(points)), 1)
    shrunk = 0
    for place in range(len(around.lower)):
        ask = lambda room, p=place: local(bounder, p).around(bounder.root(questions[:1]), torch.tensor([0]), cost, room)
        low, high = ask(room)
        assert (z[:, place] >= low).all() and (z[:, place] <= high).all()
        shrunk += (low > ask(room + 1e6)[0] + 1e-3).item()
    assert shrunk > 5


@pytest.mark.parametrize("seed", range(8))
def test_ends_signs_and_spans_of_a_domain_keep_the_point_where_its_row_is_least(seed):
    """Every pattern of signs by its own linear program, with the ends and without them."""
    for epsilon in (0.05, 0.03, 0.02, 0.01):
        decider = Decider(tiny(seed, deep=seed % 2 == 0), SHAPE, epsilon)
        _, bounder, questions = decider.margins(images(1, seed)[0].float() / 255, torch.tensor(seed % 3), 0)
        if len(bounder.reduced.lower) <= 7:
            break
    around, question = bounder.reduced, questions[1]
    patterns = torch.tensor(list(itertools.product((-1, 1), repeat=len(around.lower))), dtype=torch.int8)
    values = torch.tensor([program(around, question, p.numpy()) for p in patterns])
    best = patterns[values.argmin()]
    for fixed in range(3):  # nothing, and then some of the signs that the least point has
        domains = bounder.root(question[None])
        domains.signs[0] = best * (torch.rand(len(best), generator=torch.Generator().manual_seed(fixed)) < fixed / 3)
        at_most = lambda t, d=domains: narrow(bounder, renew(bounder, narrow(bounder, d), t))
        for narrowed in (at_most(values.min().item() + 1e-4), at_most(1e3)):
            assert narrowed.bound.item() < torch.inf and (narrowed.ends != 0).sum() > 5
            left = [p for p in patterns if (p * narrowed.signs[0] >= 0).all()]
            least = min(program(around, question, p.numpy(), narrowed.ends[0]) for p in left)
            assert least == pytest.approx(values.min().item(), abs=1e-7)

        points = torch.rand(5_000, around.inputs, dtype=torch.float64) * 2 - 1
        points[::2] = points[::2].sign()
        points = torch.where(narrowed.ends == 0, points, narrowed.ends.double())
        z = torch.cat(rows_at(around, around.images(points)), 1)
        mine = z[(z * domains.signs >= 0).all(1)]
        assert (mine >= narrowed.span[0, 0]).all() and (mine <= narrowed.span[0, 1]).all()
        assert (narrowed.span[0, 0] >= domains.span[0, 0]).all() and (narrowed.span[0, 1] <= domains.span[0, 1]).all()
        assert ((narrowed.signs != 0) >= (domains.signs != 0)).all()

    nothing = lambda points: torch.zeros(len(points), dtype=torch.bool)
    for above in (-1e-3, 1e-3):  # the answer turns where the least value passes the tolerance
        question[around.inputs] += branch.TOLERANCE + above - program(around, question, best.numpy())
        assert branch.decide(bounder, question[None], time.monotonic() + 30, nothing)[0] == ([] if above > 0 else [0])


def test_a_domain_in_which_the_row_cannot_be_small_is_proved_by_renewed_bounds():
    decider = Decider(tiny(0), SHAPE, 0.1)
    least, bounder, questions = decider.margins(images(1)[0].float() / 255, torch.tensor(0), 20)
    renewed = bounder.rebound(bounder.root(questions), least.min().item() - 5, 100)
    assert (renewed.bound == torch.inf).any()


def test_nothing_is_renewed_where_every_sign_of_the_last_layer_is_fixed():
    _, bounder, questions = Decider(tiny(0), SHAPE, 0.1).margins(images(1)[0].float() / 255, torch.tensor(0), 0)
    domains = bounder.root(questions)
    domains.signs[:, bounder.last] = 1
    renewed = bounder.rebound(domains, branch.TOLERANCE, 3)
    assert torch.equal(renewed.span, domains.span) and torch.equal(renewed.signs, domains.signs)


def test_open_domains_come_out_worst_first_whatever_comes_in_between():
    generator = torch.Generator().manual_seed(0)
    _, bounder, questions = Decider(tiny(0), SHAPE, 0.1).margins(images(1)[0].float() / 255, torch.tensor(0), 0)
    roots = bounder.root(questions)

    def some(count: int) -> bounds.Domains:
        taken = roots.take(torch.randint(len(roots), (count,), generator=generator))
        taken.bound, taken.low = torch.randn(count, generator=generator).double(), torch.rand(count, roots.low.shape[1])
        return taken

    first = some(3)
    waiting, slow = branch.Open(questions, first), [first.take(torch.tensor([i])) for i in range(3)]
    for round_ in range(30):
        fresh = some(round_ % 7)
        waiting.add(fresh)
        slow += [fresh.take(torch.tensor([i])) for i in range(len(fresh))]
        slow.sort(key=lambda domain: domain.bound.item())
        taken, expected, slow = waiting.worst(3), slow[:3], slow[3:]
        assert len(waiting) == len(slow) and waiting.targets() == {d.target.item() for d in slow}
        assert torch.equal(taken.bound, torch.cat([d.bound for d in expected]))
        assert torch.equal(taken.low, torch.cat([d.low for d in expected]))
        assert torch.equal(taken.rows, questions[taken.target])
    waiting.drop({0, 1})
    assert waiting.targets() == {d.target.item() for d in slow} - {0, 1}


def test_corners_followed_downwards_never_end_higher_and_stay_in_the_box():
    _, bounder, questions = Decider(tiny(0), SHAPE, 0.1).margins(images(1)[0].float() / 255, torch.tensor(0), 0)
    around, x = bounder.reduced, torch.rand(50, bounder.reduced.inputs) * 2 - 1

    def value(x):
        z = rows_at(around, around.images(x.double()))
        return torch.cat([x.double(), torch.ones(len(x), 1), *(t.clamp(min=0) for t in z)], 1) @ questions[0]

    found = bounder.descend(questions[:1].expand(50, -1), x, 10)
    assert (value(found) <= value(x) + 1e-5).all() and value(found).mean() < value(x).mean() - 0.1
    assert found.abs().max() <= 1
