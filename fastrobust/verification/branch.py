"""Branch and bound on the signs of ReLUs (Bunel et al., 2020), on the reduced network around one image. A domain is a set of
ReLUs whose sign is fixed; its children fix one more, either way."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastrobust.verification.bounds import Bounder, Domains, join, relu_lines

TOLERANCE = 1e-4  # what a margin must exceed to count as positive


@torch.no_grad()
def split(bounder: Bounder, domains: Domains, candidates: int) -> tuple[Tensor, Tensor]:
    """(for every domain the ReLU to fix next, or -1 where none is free; the corners of the box where the relaxations are
    least, N x D). The ReLUs whose triangles cost a bound most are candidates; both children of each are tried with
    the slopes of their parent (filtered smart branching, De Palma et al., 2021)."""
    rows, everyone = domains.rows.float(), torch.arange(len(domains))
    _, coefficients, x = bounder.below(rows, domains.signs, domains.low, domains.push)
    corners = torch.where(x > 0, *bounder.reduced.box)
    _, lower, upper, *_ = bounder.tensors[torch.float32]
    _, offset, _ = relu_lines(lower, upper)
    cost = torch.where(domains.signs == 0, -coefficients.clamp(max=0) * offset, -1)
    gains, picks = [], []
    for layer in bounder.reduced.layers:
        cost_here, index = cost[:, layer].topk(min(candidates, layer.stop - layer.start), dim=1)
        for j in range(index.shape[1]):
            pick = index[:, j] + layer.start
            least = torch.full((len(domains),), torch.inf)
            for sign in (1, -1):
                signs = domains.signs.clone()
                signs[everyone, pick] = sign
                least = torch.minimum(least, bounder.below(rows, signs, domains.low, domains.push)[0])
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
    """Is row . [x, 1, r] > TOLERANCE everywhere? ("verified" | "falsified" | "timeout", an adversarial input if found,
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
        pick, corners = split(bounder, worst, candidates)
        hit = broken(corners)
        if hit.any():
            return "falsified", corners[hit][0], visited
        if (pick < 0).any():  # every sign is fixed, and the bound still fails
            return "timeout", None, visited
        fresh = bounder.tighten(children(worst, pick), steps, rate=0.05, enough=2 * TOLERANCE)
        visited += len(fresh)
        open_ = join(open_, fresh)
