"""Branch and bound on the signs of ReLUs (Bunel et al., 2020), on the reduced network around one image.

Its bounds are linear relaxations with optimised slopes (alpha-CROWN, Xu et al., 2021) and multipliers for the signs that
are fixed (beta-CROWN, Wang et al., 2021).

A domain is a set of ReLUs whose sign is fixed. Slopes and multipliers are optimised in single precision; the bound that they
give is then computed in double precision, and only that one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastrobust.verification.bounds import ROUNDING, Box, relu_lines
from fastrobust.verification.reduced import Matrices, Reduced, reduce

TOLERANCE = 1e-4  # what a margin must exceed to count as positive


@dataclass
class Domains:
    """N domains. rows: the question of each, float64 N x (U + D + 1). signs: int8 N x U, +1 fixed active, -1 fixed inactive,
    0 free. low, push: slopes of the lower lines and multipliers of the fixed signs, float32 N x U. bound: the best lower
    bounds found, float64 N."""

    rows: Tensor
    signs: Tensor
    low: Tensor
    push: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, index: Tensor) -> Domains:
        return Domains(*(getattr(self, f.name)[index] for f in fields(self)))


def join(*parts: Domains) -> Domains:
    return Domains(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Domains)))


class Bounder:
    """Lower bounds of rows over the box of a reduced network."""

    def __init__(self, reduced: Reduced):
        self.reduced = reduced
        self.tensors = {
            dtype: tuple(t.to(dtype) for t in (reduced.weights, reduced.lower, reduced.upper, *reduced.box))
            for dtype in (torch.float32, torch.float64)
        }

    def below(self, rows: Tensor, signs: Tensor, low: Tensor, push: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(lower bounds, N; coefficients of the ReLUs' outputs, N x U; coefficients of the inputs, N x D), in the precision
        of `rows`, differentiable in low and push."""
        weights, lower, upper, x_low, x_high = self.tensors[rows.dtype]
        lower = torch.where(signs > 0, 0, lower)
        upper = torch.where(signs < 0, 0, upper)
        slope, offset, line = relu_lines(lower, upper)
        line = torch.where(signs == 0, low.to(rows.dtype), line)
        pushes = -signs * push.to(rows.dtype)
        total, coefficients = 0, []
        for layer in reversed(self.reduced.layers):
            mine = rows[:, layer]
            coefficients.append(mine)
            positive, negative = mine.clamp(min=0), mine.clamp(max=0)
            total = total + (negative * offset[:, layer]).sum(1)
            mine = positive * line[:, layer] + negative * slope[:, layer] + pushes[:, layer]
            rows = rows + mine @ weights[layer]
        x = rows[:, self.reduced.size : -1]
        total = total + rows[:, -1] + x.clamp(min=0) @ x_low + x.clamp(max=0) @ x_high
        return total, torch.cat(coefficients[::-1], 1), x

    def root(self, rows: Tensor) -> Domains:
        """One domain per row (N x (U + D + 1)), nothing fixed."""
        _, lower, upper, *_ = self.tensors[torch.float32]
        low = relu_lines(lower, upper)[2].expand(len(rows), -1).contiguous()
        signs = torch.zeros_like(low, dtype=torch.int8)
        return Domains(rows, signs, low, torch.zeros_like(low), torch.full((len(rows),), -torch.inf, dtype=torch.float64))

    def tighten(self, domains: Domains, steps: int, rate: float = 0.1, enough: float = torch.inf) -> Domains:
        """Optimise slopes and multipliers with Adam; what reaches `enough` needs no more. The better of the new bound, in
        double precision, and the old one is kept."""
        rows, signs = domains.rows.float(), domains.signs
        if steps == 0:
            with torch.no_grad():
                bound, *_ = self.below(domains.rows, signs, domains.low, domains.push)
            return replace(domains, bound=torch.maximum(bound, domains.bound))
        low, push = domains.low.clone().requires_grad_(), domains.push.clone().requires_grad_()
        optimizer = torch.optim.Adam([{"params": [low]}, {"params": [push]}], lr=rate)
        best, best_low, best_push = torch.full((len(domains),), -torch.inf), domains.low, domains.push
        for step in range(steps + 1):
            value, *_ = self.below(rows, signs, low, push)
            better = value.detach() > best
            best = torch.where(better, value.detach(), best)
            best_low = torch.where(better[:, None], low.detach(), best_low)
            best_push = torch.where(better[:, None], push.detach(), best_push)
            if step == steps or (best > enough).all():
                break
            optimizer.zero_grad()
            (-value.clamp(max=enough + 1).sum()).backward()
            optimizer.step()
            with torch.no_grad():
                low.clamp_(0, 1)
                push.clamp_(min=0)
            for group in optimizer.param_groups:
                group["lr"] *= 0.97
        with torch.no_grad():
            proved, *_ = self.below(domains.rows, signs, best_low, best_push)
        return Domains(domains.rows, signs, best_low, best_push, torch.maximum(proved, domains.bound))

    @torch.no_grad()
    def split(self, domains: Domains, candidates: int) -> tuple[Tensor, Tensor]:
        """(for every domain the ReLU to fix next, or -1 where none is free; the corners of the box where the relaxations are
        least, N x D). The ReLUs whose triangles cost a bound most are candidates; both children of each are tried with
        the slopes of their parent (filtered smart branching, De Palma et al., 2021)."""
        rows, everyone = domains.rows.float(), torch.arange(len(domains))
        _, coefficients, x = self.below(rows, domains.signs, domains.low, domains.push)
        corners = torch.where(x > 0, *self.reduced.box)
        _, lower, upper, *_ = self.tensors[torch.float32]
        _, offset, _ = relu_lines(lower, upper)
        cost = torch.where(domains.signs == 0, -coefficients.clamp(max=0) * offset, -1)
        gains, picks = [], []
        for layer in self.reduced.layers:
            cost_here, index = cost[:, layer].topk(min(candidates, layer.stop - layer.start), dim=1)
            for j in range(index.shape[1]):
                pick = index[:, j] + layer.start
                least = torch.full((len(domains),), torch.inf)
                for sign in (1, -1):
                    signs = domains.signs.clone()
                    signs[everyone, pick] = sign
                    least = torch.minimum(least, self.below(rows, signs, domains.low, domains.push)[0])
                gains.append(torch.where(cost_here[:, j] >= 0, least + 1e-4 * cost_here[:, j], -torch.inf))
                picks.append(pick)
        if not gains:
            return torch.full((len(domains),), -1), corners
        best = torch.stack(gains, 1).max(1)
        pick = torch.stack(picks, 1)[everyone, best.indices]
        return torch.where(best.values > -torch.inf, pick, -1), corners


def children(domains: Domains, pick: Tensor) -> Domains:
    pair = join(domains, domains)
    count, everyone = len(domains), torch.arange(len(domains))
    pair.signs[everyone, pick] = 1
    pair.signs[everyone + count, pick] = -1
    return pair


def decide(
    bounder: Bounder,
    row: Tensor,
    deadline: float,
    broken: Callable[[Tensor], Tensor],
    *,
    batch: int = 128,
    first_steps: int = 40,
    steps: int = 10,
    candidates: int = 3,
    limit: int = 500_000,
) -> tuple[str, Tensor | None, int]:
    """Is row . [r, x, 1] > TOLERANCE everywhere? ("verified" | "falsified" | "timeout", an adversarial input if found,
    domains visited). `broken` says of inputs (N x D, normalised pixels) whether they are adversarial; the deadline is one of
    time.monotonic()."""
    open_ = bounder.tighten(bounder.root(row[None]), first_steps, enough=2 * TOLERANCE)
    visited = 1
    while True:
        open_ = open_.take((open_.bound <= TOLERANCE).nonzero()[:, 0])
        if not len(open_):
            return "verified", None, visited
        if time.monotonic() > deadline or visited > limit:
            return "timeout", None, visited
        order = open_.bound.argsort()
        worst, open_ = open_.take(order[:batch]), open_.take(order[batch:])
        pick, corners = bounder.split(worst, candidates)
        hit = broken(corners)
        if hit.any():
            return "falsified", corners[hit][0], visited
        if (pick < 0).any():  # every sign is fixed, and the bound still fails
            return "timeout", None, visited
        fresh = bounder.tighten(children(worst, pick), steps, rate=0.05, enough=2 * TOLERANCE)
        visited += len(fresh)
        open_ = join(open_, fresh)


def hidden_bounds(matrices: Matrices, hidden: list[Box], box: Box, steps: int = 0) -> list[Box]:
    """Bounds on the inputs of every ReLU of a network, of one image, from those on its first layers: linear relaxations for
    the layers that are missing, or, with `steps`, optimised ones for every unstable ReLU after the first layer. All flat."""
    found = [hidden[0]]
    for k in range(1, len(matrices.weights) - 1):
        if k < len(hidden) and not steps:
            found.append(hidden[k])
            continue
        around = reduce(matrices, found, box)
        if k < len(hidden):
            lower, upper = (side.clone() for side in hidden[k])
            ask = ((lower < 0) & (upper > 0)).nonzero()[:, 0]
        else:
            inputs = (side.clamp(min=0).numpy() for side in found[-1])
            lower, upper = (torch.from_numpy(side) for side in matrices.interval(k, *inputs))
            ask = torch.arange(len(lower))
        questions = around.questions(matrices.weights[k][ask.numpy()], matrices.shifts[k][ask.numpy()])
        bounder = Bounder(around)
        least = bounder.tighten(bounder.root(torch.cat([questions, -questions])), steps).bound - ROUNDING
        lower[ask] = torch.maximum(lower[ask], least[: len(ask)])
        upper[ask] = torch.minimum(upper[ask], -least[len(ask) :])
        found.append((lower, upper))
    return found
