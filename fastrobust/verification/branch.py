"""Branch and bound on the signs of ReLUs (Bunel et al., 2020), with optimised linear relaxations as its bounds (Wang et al.,
2021). It decides whether one image keeps its class against one other class in a box.

A domain is a set of ReLUs whose sign is fixed. Slopes and multipliers are optimised in single precision; the bound that they
give is then computed in double precision, and only that one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrobust.verification import bounds
from fastrobust.verification.bounds import Box
from fastrobust.verification.network import Network

TOLERANCE = 1e-4  # what a margin must exceed to count: see `docs/verification.md`


@dataclass
class Domains:
    """D domains. signs: per ReLU layer, int8 D x values: +1 fixed active, -1 fixed inactive, 0 free. low and push:
    slopes and multipliers, float32 D x values. lower: the best bounds found, float64 D."""

    signs: list[Tensor]
    low: list[Tensor]
    push: list[Tensor]
    lower: Tensor

    def __len__(self) -> int:
        return len(self.lower)

    def take(self, index: Tensor) -> Domains:
        pick = lambda tensors: [t[index] for t in tensors]
        return Domains(pick(self.signs), pick(self.low), pick(self.push), self.lower[index])

    @staticmethod
    def join(parts: list[Domains]) -> Domains:
        cat = lambda lists: [torch.cat(tensors) for tensors in zip(*lists, strict=True)]
        return Domains(
            cat([p.signs for p in parts]),
            cat([p.low for p in parts]),
            cat([p.push for p in parts]),
            torch.cat([p.lower for p in parts]),
        )


class Problem:
    """Is row . relu(z) + shift > 0 everywhere in the box, with z the values of the last hidden layer? hidden: bounds of
    one image (B = 1), as from `bounds.crown`."""

    def __init__(self, network: Network, hidden: list[Box], box: Box, row: Tensor, shift: Tensor):
        self.depth = len(network.layers) - 1
        flat = lambda boxes, dtype: [tuple(side.reshape(1, -1).to(dtype) for side in b) for b in boxes]
        self.exact = (network, flat(hidden, torch.float64), flat([box], torch.float64)[0], row[None, None], shift)
        single = network.single()
        self.fast = (single, flat(hidden, torch.float32), flat([box], torch.float32)[0], row[None, None].float(), shift.float())

    def bound(self, which, signs, low, push, coefficients=None) -> Tensor:
        """Lower bounds of the domains (D), differentiable in low and push."""
        network, hidden, (x_low, x_high), row, shift = which
        count = len(signs[0])
        boxes = []
        for (lower, upper), sign in zip(hidden, signs, strict=True):
            lower, upper = lower.expand(count, -1), upper.expand(count, -1)
            boxes.append((lower.masked_fill(sign > 0, 0).maximum(lower), upper.masked_fill(sign < 0, 0).minimum(upper)))
        slopes = [t.to(row.dtype).clamp(0, 1)[:, None] for t in low]
        pushes = [(-sign * t.to(row.dtype).clamp(min=0))[:, None] for sign, t in zip(signs, push, strict=True)]
        box = (x_low.expand(count, -1), x_high.expand(count, -1))
        value = bounds.below(network, self.depth, row.expand(count, -1, -1), boxes, box, slopes, pushes, coefficients)
        return value[:, 0] + shift

    def root(self) -> Domains:
        _, hidden, *_ = self.fast
        signs = [torch.zeros_like(lower, dtype=torch.int8) for lower, _ in hidden]
        low = [bounds.relu_lines(*box)[2] for box in hidden]
        return Domains(signs, low, [torch.zeros_like(t) for t in low], torch.full((1,), -torch.inf, dtype=torch.float64))

    def tighten(self, domains: Domains, steps: int, rate: float) -> Domains:
        """Optimise slopes and multipliers; the better of the new bound (in double precision) and the old one is kept."""
        low = [t.clone().requires_grad_() for t in domains.low]
        push = [t.clone().requires_grad_() for t in domains.push]
        optimizer = torch.optim.Adam([{"params": low, "lr": rate}, {"params": push, "lr": rate / 2}])
        best, best_low, best_push = torch.full((len(domains),), -torch.inf), list(domains.low), list(domains.push)
        for step in range(steps + 1):
            value = self.bound(self.fast, domains.signs, low, push)
            better = value.detach() > best
            best = torch.where(better, value.detach(), best)
            best_low = [torch.where(better[:, None], a.detach(), b) for a, b in zip(low, best_low, strict=True)]
            best_push = [torch.where(better[:, None], a.detach(), b) for a, b in zip(push, best_push, strict=True)]
            if step == steps or (best > 10 * TOLERANCE).all():
                break
            optimizer.zero_grad()
            (-value.clamp(max=1.0).sum()).backward()  # what is proved needs no more
            optimizer.step()
            with torch.no_grad():
                for t in low:
                    t.clamp_(0, 1)
                for t in push:
                    t.clamp_(min=0)
            for group in optimizer.param_groups:
                group["lr"] *= 0.98
        with torch.no_grad():
            proved = self.bound(self.exact, domains.signs, best_low, best_push)
        return Domains(domains.signs, best_low, best_push, torch.maximum(proved, domains.lower))

    def corner(self, domains: Domains) -> Tensor:
        """The corners of the box at which the relaxations have their least values: D x inputs, normalised pixels."""
        network, hidden, (x_low, x_high), row, shift = self.fast
        x = ((x_low + x_high) / 2).expand(len(domains), -1)
        # the coefficients of the inputs are the gradient of the bound with respect to a shift of the box
        move = torch.zeros_like(x, requires_grad=True)
        which = (network, hidden, (x_low + move, x_high + move), row, shift)
        (gradient,) = torch.autograd.grad(self.bound(which, domains.signs, domains.low, domains.push).sum(), move)
        low, high = self.exact[2]
        return torch.where(gradient > 0, low, high)

    def split(self, domains: Domains, candidates: int) -> tuple[Tensor, Tensor]:
        """For every domain the ReLU to fix next: (layer, index), D each. The ReLUs whose triangles cost the bound most are
        the candidates of each layer; each is tried with one bound of either child."""
        count, found = len(domains), []
        with torch.no_grad():
            coefficients: list[Tensor] = []
            self.bound(self.fast, domains.signs, domains.low, domains.push, coefficients)
            coefficients.reverse()
            tries = []
            for i, (lower, upper) in enumerate(self.fast[1]):
                _, offset, _ = bounds.relu_lines(lower, upper)
                free = (lower < 0) & (upper > 0) & (domains.signs[i] == 0)
                score = torch.where(free, -coefficients[i][:, 0].clamp(max=0) * offset, -1)
                score, index = score.topk(min(candidates, score.shape[1]), dim=1)
                tries += [(i, index[:, j], score[:, j]) for j in range(index.shape[1])]
            for i, index, score in tries:
                child = []
                for sign in (1, -1):
                    signs = [s.clone() if k == i else s for k, s in enumerate(domains.signs)]
                    signs[i][torch.arange(count), index] = sign
                    child.append(self.bound(self.fast, signs, domains.low, domains.push))
                gain = torch.minimum(*child)
                found.append(torch.where(score >= 0, gain, -torch.inf))
            gains = torch.stack(found, 1)
            # ties (one child gains nothing) are broken by what the triangles cost
            gains = gains + 1e-4 * torch.stack([score for _, _, score in tries], 1)
            pick = gains.argmax(1)
        layers = torch.tensor([i for i, _, _ in tries])[pick]
        index = torch.stack([index for _, index, _ in tries], 1)[torch.arange(count), pick]
        layers[gains.max(1).values == -torch.inf] = -1
        return layers, index


def children(domains: Domains, layers: Tensor, index: Tensor) -> Domains:
    """Both children of every domain."""
    pair = Domains.join([domains, domains])
    pair.signs = [s.clone() for s in pair.signs]
    count = len(domains)
    for i, signs in enumerate(pair.signs):
        mine = (layers == i).nonzero()[:, 0]
        signs[mine, index[mine]] = 1
        signs[mine + count, index[mine]] = -1
    return pair


def decide(
    problem: Problem,
    deadline: float,
    broken: Callable[[Tensor], Tensor],
    *,
    batch: int = 64,
    first_steps: int = 40,
    steps: int = 12,
    candidates: int = 3,
    limit: int = 200_000,
) -> tuple[str, Tensor | None, int]:
    """("verified" | "falsified" | "timeout", the adversarial input if any, domains visited). `broken` says of inputs (N x
    inputs, normalised pixels) whether they are adversarial; the deadline is one of time.monotonic()."""
    open_ = problem.tighten(problem.root(), first_steps, 0.1)
    visited = 1
    while True:
        open_ = open_.take((open_.lower <= TOLERANCE).nonzero()[:, 0])
        if not len(open_):
            return "verified", None, visited
        if time.monotonic() > deadline or visited > limit:
            return "timeout", None, visited
        order = open_.lower.argsort()
        worst, open_ = open_.take(order[:batch]), open_.take(order[batch:])
        points = problem.corner(worst)
        hit = broken(points)
        if hit.any():
            return "falsified", points[hit][0], visited
        layers, index = problem.split(worst, candidates)
        if (layers < 0).any():  # every ReLU is fixed and the bound still fails
            return "timeout", None, visited
        fresh = problem.tighten(children(worst, layers, index), steps, 0.05)
        visited += len(fresh)
        open_ = Domains.join([open_, fresh])
