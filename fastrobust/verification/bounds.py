"""Lower bounds on rows over the box of a reduced network: linear relaxations carried backward to the input (CROWN, Zhang et
al., 2018) with optimised slopes (alpha-CROWN, Xu et al., 2021) and multipliers for the ReLUs whose sign is fixed
(beta-CROWN, Wang et al., 2021).

Slopes and multipliers are optimised in single precision; the bound that they give is then computed in double precision,
and only that one counts.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastrobust.verification.network import Network, slack
from fastrobust.verification.reduced import Reduced

HEAVIEST = 100.0  # multiplier of what is given: keeps what rounding can do to a bound far below ROUNDING
FASTER = 4  # multipliers have further to go than slopes, which lie in [0, 1]
COSTLY = 24  # ReLUs of the last layer whose bounds are renewed at a time, in a domain
FARTHER = 2  # an end of a span that is so many times as far from 0 as the other one changes the triangle little
FIRST_STEPS = 20  # of the optimiser, for the slopes that later bounds on the last layer begin with
ROWS = {"cpu": 512, "cuda": 16384}  # at once, when the last layer is bounded anew: what the caches hold, or fills a GPU
MANY = 2048  # ReLUs whose inputs are bounded at once, before any search


def relu_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The ReLU over [lower, upper] lies under slope * z + offset: (slope, offset)."""
    up, down = upper.clamp(min=0), lower.clamp(max=0)
    slope = up / (up - down).clamp(min=1e-30)
    return slope, -slope * down


@dataclass
class Domains:
    """N domains. rows: the question of each, float64 N x (D + 1 + U); target: its number, int64 N. signs: int8 N x U,
    positive fixed active, negative fixed inactive (1 by a split, 2 by a bound), 0 free. ends: int8 N x D, the end of each
    input's range that is meant, 0 for all of it. span: bounds on the inputs of the ReLUs, float64 N x 2 x U. low, push:
    slopes of the lower lines and multipliers of the fixed signs, float32 N x U. bound: the best lower bounds found, float64
    N. depth: int64 N. known: how much was settled when all spans were last renewed, int64 N.

    Signs, ends and spans hold for the points of the domain where the row is least in the whole box, if it does not exceed
    the tolerance there. Nothing else matters for the question whether there is a point where it does not.
    """

    rows: Tensor
    target: Tensor
    signs: Tensor
    ends: Tensor
    span: Tensor
    low: Tensor
    push: Tensor
    bound: Tensor
    depth: Tensor
    known: Tensor

    def settled(self) -> Tensor:
        """How many signs and ends are fixed, int64 N."""
        return (self.signs != 0).sum(1) + (self.ends != 0).sum(1)

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, index: Tensor) -> Domains:
        return Domains(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Tensor, domains: Domains) -> None:
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(domains, f.name)


def join(*parts: Domains) -> Domains:
    return Domains(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Domains)))


@dataclass
class Lines:
    """A ReLU over z lies under slope * z + offset and over low * z; N x U each. signs: -1, 0 or 1. ends, free: N x D, as in
    Domains, and 1 where that is 0."""

    slope: Tensor
    offset: Tensor
    low: Tensor
    signs: Tensor
    ends: Tensor
    free: Tensor


class Adam:
    """Ascent on one tensor in place (Kingma & Ba, 2015). Rows are independent of each other, as nothing is averaged."""

    def __init__(self, parameter: Tensor):
        self.parameter, self.step = parameter, 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def climb(self, slope: Tensor, rate: float) -> None:
        self.step += 1
        self.mean.lerp_(slope, 0.1)
        self.square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = self.square.div(1 - 0.999**self.step).add_(1e-16).rsqrt_()
        self.parameter.addcmul_(self.mean, size, value=rate / (1 - 0.9**self.step))


class Bounder:
    """Lower bounds of rows over the box of a reduced network. After the deadline, one of time.monotonic(), nothing is
    optimised further: the bounds so far hold."""

    def __init__(self, reduced: Reduced, deadline: float = math.inf):
        self.reduced, self.deadline = reduced, deadline
        self.last = reduced.layers[-1] if reduced.layers else slice(0, 0)
        self.weights = {dtype: reduced.weights.to(dtype) for dtype in (torch.float32, torch.float64)}
        self.sizes = reduced.weights.abs()
        self.parts: dict = {}  # what single ReLUs depend on (narrowing)

    # Of the operations on N x U numbers below, those on truth values (where, masks) would take ten times as long as sums
    # and products do on a CPU.

    def lines(self, domains: Domains, low: Tensor, dtype: torch.dtype) -> Lines:
        signs, ends = domains.signs.sign().to(dtype), domains.ends.to(dtype)
        active, fixed = signs.clamp(min=0), signs.abs()
        low_z = domains.span[:, 0].to(dtype) * (1 - active)
        high_z = domains.span[:, 1].to(dtype) * (1 - fixed + active)
        low = torch.lerp(low.to(dtype), active, fixed)
        return Lines(*relu_lines(low_z, high_z), low, signs, ends, 1 - ends.abs())

    def below(self, rows: Tensor, lines: Lines, push: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(lower bounds, N; coefficients of the ReLUs' outputs, N x U; coefficients of the inputs, N x D), in the precision
        of `rows`."""
        weights, size = self.weights[rows.dtype], lines.signs.shape[1]
        r = self.reduced.inputs + 1  # where the ReLUs begin
        coefficients = rows[:, r:].clone()
        passed = torch.empty_like(coefficients)  # what goes back through the inputs of the ReLUs
        pushed = lines.signs * push.to(rows.dtype)
        total = torch.zeros_like(rows[:, 0])
        for layer in reversed(self.reduced.layers):
            mine = coefficients[:, layer]
            if layer.stop < size:
                mine.addmm_(passed[:, layer.stop :], weights[layer.stop :, r + layer.start : r + layer.stop])
            negative = mine.clamp(max=0)
            back = mine.clamp(min=0).mul_(lines.low[:, layer]).addcmul_(negative, lines.slope[:, layer])
            torch.sub(back, pushed[:, layer], out=passed[:, layer])
            total += negative.mul_(lines.offset[:, layer]).sum(1)
        back = torch.addmm(rows[:, :r], passed, weights[:, :r])
        x = back[:, : r - 1]
        total += back[:, r - 1] + torch.addcmul(x * lines.ends, x.abs(), lines.free, value=-1).sum(1)
        return total, coefficients, x

    def point(self, lines: Lines, coefficients: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the relaxation behind such a bound is least: ([x, 1, r], N x (D + 1 + U); inputs of the ReLUs, N x U)."""
        weights = self.weights[x.dtype]
        r = self.reduced.inputs + 1
        known = x.new_empty(len(x), weights.shape[1])
        known[:, : r - 1], known[:, r - 1] = lines.ends - x.sign() * lines.free, 1
        z, lowest = torch.empty_like(coefficients), coefficients.sign().add_(1).mul_(0.5)
        for layer in self.reduced.layers:
            mine = z[:, layer]
            torch.mm(known[:, : r + layer.start], weights[layer, : r + layer.start].T, out=mine)
            above = torch.addcmul(lines.offset[:, layer], lines.slope[:, layer], mine)
            known[:, r + layer.start : r + layer.stop] = above.lerp_(lines.low[:, layer] * mine, lowest[:, layer])
        return known, z

    def descend(self, rows: Tensor, x: Tensor, steps: int) -> Tensor:
        """Inputs (float32 N x D in [-1, 1]) from which each row is at its least after so many steps down its slope."""
        weights, r = self.weights[torch.float32], self.reduced.inputs + 1
        rows, known = rows.float(), x.new_ones(len(x), weights.shape[1])
        least, best = torch.full((len(x),), torch.inf), x
        for step in range(steps):
            known[:, : r - 1] = x
            for layer in self.reduced.layers:
                z = known[:, : r + layer.start] @ weights[layer, : r + layer.start].T
                known[:, r + layer.start : r + layer.stop] = z.clamp(min=0)
            value = (known * rows).sum(1)
            best = torch.where((value < least)[:, None], x, best)
            least = torch.minimum(value, least)
            on = (known[:, r:] > 0).float()
            exact = Lines(on, torch.zeros_like(on), on, on, torch.zeros_like(x), torch.ones_like(x))
            slope = self.below(rows, exact, torch.zeros_like(on))[2]
            rate = 0.7 * 0.8**step / slope.abs().mean(1, keepdim=True).clamp(min=1e-12)
            x = (x - rate * slope).clamp(-1, 1)
        return best

    def root(self, rows: Tensor) -> Domains:
        """One domain per row (N x (D + 1 + U)), nothing fixed."""
        lower, upper = self.reduced.lower, self.reduced.upper
        count = len(rows)
        low = (upper > -lower).float().expand(count, -1).contiguous()  # whichever leaves the smaller triangle
        signs = torch.zeros_like(low, dtype=torch.int8)
        span = torch.stack([lower, upper]).expand(count, -1, -1).contiguous()
        ends = torch.zeros(count, self.reduced.inputs, dtype=torch.int8)
        bound = torch.full((count,), -torch.inf, dtype=torch.float64)
        zeros = torch.zeros(count, dtype=torch.int64)
        return Domains(rows, torch.arange(count), signs, ends, span, low, torch.zeros_like(low), bound, zeros, zeros.clone())

    def tighten(self, domains: Domains, steps: int, rate: float = 0.1, enough: float = torch.inf) -> Domains:
        """Optimise slopes and multipliers with Adam; what reaches `enough` needs no more. The better of the new bound, in
        double precision, and the old one is kept."""
        bound, low, push, _ = self.optimise(domains, None, steps, rate, enough)
        bound[bound.isnan()] = -torch.inf  # what overflows proves nothing
        return replace(domains, low=low, push=push, bound=torch.maximum(bound, domains.bound))

    def optimise(
        self, domains: Domains, given: Tensor | None, steps: int, rate: float, enough: float = torch.inf
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(bounds in double precision, slopes, multipliers, multipliers of what is given: N x 1). given: rows that are at
        most 0 wherever the bound has to hold."""
        rows, free = domains.rows.float(), (domains.signs == 0).float()
        lines = self.lines(domains, domains.low, torch.float32)
        parameters = [lines.low, domains.push.clone(), torch.zeros(len(rows), 1)]
        best = [p.clone() for p in parameters]
        if steps > 0:
            extra = None if given is None else given.float()
            least = torch.full((len(rows),), -torch.inf)
            adam = [Adam(p) for p in (parameters if extra is not None else parameters[:2])]
            for step in range(steps + 1):
                asked = rows if extra is None else torch.addcmul(rows, parameters[2], extra)
                value, coefficients, x = self.below(asked, lines, parameters[1])
                better = (value > least).float()[:, None]
                least = torch.maximum(value, least)
                for old, new in zip(best, parameters, strict=True):
                    old.lerp_(new, better)
                if step == steps or (least > enough).all() or time.monotonic() > self.deadline:
                    break
                known, z = self.point(lines, coefficients, x)
                slopes = [coefficients.clamp_(min=0).mul_(z).mul_(free), z.mul_(-lines.signs)]
                if extra is not None:
                    slopes.append((known * extra).sum(1, keepdim=True))
                for moving, slope, most in zip(adam, slopes, (1, torch.inf, HEAVIEST), strict=False):
                    moving.climb(slope, rate * 0.97**step * (FASTER if most == torch.inf else 1))
                    moving.parameter.clamp_(0, most)
        asked = domains.rows if given is None else domains.rows + best[2].double() * given
        lines = self.lines(domains, best[0], torch.float64)
        return (self.below(asked, lines, best[1])[0], *best)

    def rebound(self, domains: Domains, tolerance: float, steps: int, rate: float = 0.1) -> Domains:
        """Bounds on the inputs of the last layer's ReLUs, for each domain where its row is at most `tolerance`: nothing else
        matters for the question whether there is such a place (Kotha et al., 2023). A domain without one gets the bound
        infinity."""
        lines = self.lines(domains, domains.low, torch.float32)
        coefficients = self.below(domains.rows.float(), lines, domains.push)[1][:, self.last]
        cost = -coefficients * lines.offset[:, self.last] * (domains.signs[:, self.last] == 0)
        least = cost.topk(min(COSTLY, cost.shape[1]), dim=1).values[:, -1:]
        owners, places = ((cost > 0) & (cost >= least)).nonzero(as_tuple=True)
        given, span, size = domains.rows.clone(), domains.span.clone(), ROWS[domains.rows.device.type] // 2
        given[:, self.reduced.inputs] -= tolerance
        for owner, place in zip(owners.split(size), (places + self.last.start).split(size), strict=True):
            z, low, high = self.reduced.weights[place], -span[owner, 0, place], span[owner, 1, place]
            sides = [low <= FARTHER * high, high <= FARTHER * low]
            both = torch.cat([owner[side] for side in sides])
            low = torch.cat([self.slopes[k][place[side] - self.last.start] for k, side in enumerate(sides)])
            asked = replace(domains.take(both), rows=torch.cat([z[sides[0]], -z[sides[1]]]), low=low)
            asked.push.zero_()
            found, *_, weight = self.optimise(asked, given[both], steps, rate)
            found -= slack(found) * (1 + weight[:, 0].double())
            low, high = found.split([int(side.sum()) for side in sides])
            at = [(owner[side], k, place[side]) for k, side in enumerate(sides)]
            span[at[0]], span[at[1]] = torch.maximum(span[at[0]], low), torch.minimum(span[at[1]], -high)
        return with_signs(replace(domains, span=span))

    @cached_property
    def slopes(self) -> Tensor:
        """Good slopes for bounds on the inputs of the last layer's ReLUs from below and from above, float32 2 x n x U."""
        rows = self.reduced.weights[self.last]
        roots = self.root(torch.cat([rows, -rows]))
        return self.optimise(roots, None, FIRST_STEPS, 0.1)[1].unflatten(0, (2, len(rows)))


def with_signs(domains: Domains) -> Domains:
    """With the signs that follow from the spans; a domain whose spans leave nothing gets the bound infinity."""
    low, high = domains.span[:, 0], domains.span[:, 1]
    signs = torch.where(low >= 0, 2, torch.where(high <= 0, -2, domains.signs)).to(torch.int8)
    empty = ((low > high) | (signs * domains.signs.sign() < 0)).any(1)
    return replace(domains, signs=signs, bound=torch.where(empty, torch.inf, domains.bound))


def surround(network: Network, box: tuple[Tensor, Tensor], steps: int = 0, deadline: float = math.inf) -> Reduced:
    """The network around a box of inputs (flat), its outputs left out. The inputs of the ReLUs are bounded layer by layer:
    by intervals, where those leave the sign open by linear relaxation, and where that does by one whose slopes are
    optimised for `steps` steps. Raises TooLarge."""
    around, ends = Reduced.start(box), [tuple(side.numpy() for side in box)]
    for k, relu in enumerate(network.relus):
        z = around.after(relu)
        lower, upper = relu.interval(ends)
        bounder = Bounder(around, deadline)
        for effort in [0, steps] if steps else [0]:
            open_ = ((lower < 0) & (upper > 0) & (not relu.of_inputs)).nonzero()[0]  # of the inputs intervals are exact
            for some in np.split(open_, range(MANY, len(open_), MANY)) if len(open_) else ():
                if time.monotonic() > deadline:
                    break
                rows = torch.from_numpy(z[some].toarray())
                found = bounder.tighten(bounder.root(torch.cat([rows, -rows])), effort).bound.numpy()
                found -= slack(found)
                lower[some] = lower[some].clip(min=found[: len(some)])
                upper[some] = upper[some].clip(max=-found[len(some) :])
        around = around.extend(z, lower, upper, network.needed(k))
        ends.append((lower.clip(min=0), upper.clip(min=0)))
    return around
