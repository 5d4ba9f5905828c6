"""Branch and bound on the signs of ReLUs (Bunel et al., 2020), on the reduced network around one image. A domain is a set of
ReLUs whose sign is fixed; its children fix one more, either way."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastrobust.verification import milp
from fastrobust.verification.bounds import Bounder, Domains, join
from fastrobust.verification.narrowing import follow, narrow, pays, renew

TOLERANCE = 1e-4  # what a margin must exceed to count as positive
BATCH = {"cpu": 256, "cuda": 4096}  # domains that are split at once
CANDIDATES = 5  # ReLUs that are tried before one is chosen for a split
STEPS, RATE = 10, 0.05  # of the optimiser, for the bound of a domain
MORE, NEAR = 20, 0.05  # further steps where so much is left of what the first bound lacked: nothing grows from a proof
END_STEPS = 100  # where nothing is left to split: a linear program takes HiGHS half a second
ANEW, ANEW_STEPS = (0, 2, 4, 6, 9, 12, 18, 24, 30, 36), 14  # levels of a tree where ReLUs are bounded anew
DESCENTS, DOWN = 32, 10  # corners from which the row is followed downwards, the worst of a batch; steps
ASIDE, FIRST_ASIDE = 0.1, 0.1  # share of the time for a search of another kind; seconds that its first call may take
MOST = 250_000  # open domains, for the sake of memory


def split(bounder: Bounder, domains: Domains) -> tuple[Tensor, Tensor]:
    """(for every domain the ReLU to fix next, or -1 where no upper line costs anything: there a linear program is exact; the
    corners of the box where the relaxations are least, N x D). The ReLUs whose triangles cost a bound most are candidates;
    both children of each are tried with the slopes of their parent (filtered smart branching, De Palma et al., 2021)."""
    rows, everyone = domains.rows.float(), torch.arange(len(domains))
    lines = bounder.lines(domains, domains.low, torch.float32)
    value, coefficients, x = bounder.below(rows, lines, domains.push)
    cost = torch.where(domains.signs == 0, -coefficients.clamp(max=0) * lines.offset, -1)
    gains, picks = [], cost.topk(min(CANDIDATES, cost.shape[1]), dim=1).indices
    for pick in picks.T:
        fixed = replace(lines, slope=lines.slope.clone(), offset=lines.offset.clone(), low=lines.low.clone())
        fixed.offset[everyone, pick] = 0
        rises = []
        for slope in (1, 0):
            fixed.slope[everyone, pick] = fixed.low[everyone, pick] = slope
            # no child is worse than its parent, and more than enough is no better than enough
            rise = bounder.below(rows, fixed, domains.push)[0] - value
            rises.append(torch.minimum(rise, -value + TOLERANCE).clamp(min=0))
        costly = cost[everyone, pick]
        gain = torch.minimum(*rises) + 0.2 * torch.maximum(*rises) + 0.01 * costly
        gains.append(torch.where(costly > 0, gain, -torch.inf))
    corners = (lines.ends - x.sign() * lines.free).double()
    if not gains:
        return torch.full((len(domains),), -1), corners
    best = torch.stack(gains, 1).max(1)
    pick = picks[everyone, best.indices]
    return torch.where(best.values > -torch.inf, pick, -1), corners


class Open:
    """The domains that are open, in slots of tensors that double when they are full: only what comes and goes is copied."""

    def __init__(self, questions: Tensor, domains: Domains):
        self.questions, self.slots = questions, self.bare(domains)  # a slot whose bound is infinite is free

    def __len__(self) -> int:
        return int((self.slots.bound < torch.inf).sum())

    @staticmethod
    def bare(domains: Domains) -> Domains:
        """Without its questions, which many domains share."""
        return replace(domains, rows=domains.rows[:, :0])

    def add(self, domains: Domains) -> None:
        while len(self) + len(domains) > len(self.slots):
            self.slots = join(self.slots, self.slots)
            self.slots.bound[len(self.slots) // 2 :] = torch.inf
        self.slots.put((self.slots.bound == torch.inf).nonzero()[: len(domains), 0], self.bare(domains))

    def worst(self, count: int) -> Domains:
        """Those with the least bounds, taken out."""
        index = self.slots.bound.topk(min(count, len(self)), largest=False).indices
        taken = self.slots.take(index)
        self.slots.bound[index] = torch.inf
        return replace(taken, rows=self.questions[taken.target])

    def targets(self) -> set[int]:
        return set(self.slots.target[self.slots.bound < torch.inf].tolist())

    def drop(self, targets: set[int]) -> None:
        self.slots.bound[torch.isin(self.slots.target, torch.tensor(sorted(targets), dtype=torch.int64))] = torch.inf


def children(domains: Domains, pick: Tensor) -> Domains:
    pair = join(domains, domains)
    count, everyone = len(domains), torch.arange(len(domains))
    pair.signs[everyone, pick] = 1
    pair.signs[everyone + count, pick] = -1
    pair.depth += 1
    return pair


def rooted(bounder: Bounder, rows: Tensor) -> Domains:
    """A domain for each row, bounded as well as it can be before any split."""
    return bounder.tighten(follow(bounder, bounder.root(rows), TOLERANCE), 4 * STEPS, enough=2 * TOLERANCE)


def program(bounder: Bounder, row: Tensor, seconds: float) -> tuple[str, Tensor | None]:
    """The answer of HiGHS (`milp.decide`) to a row, with all that is known of its least point without a split."""
    root = rooted(bounder, row[None])
    if root.bound <= TOLERANCE:
        root = bounder.tighten(bounder.rebound(root, TOLERANCE, ANEW_STEPS), STEPS, RATE, enough=2 * TOLERANCE)
    if root.bound > TOLERANCE:
        return "verified", None
    return milp.decide(bounder.reduced, row, TOLERANCE, seconds, root.signs[0], root.ends[0], root.span[0])


def decide(
    bounder: Bounder,
    rows: Tensor,
    deadline: float,
    broken: Callable[[Tensor], Tensor],
    beside: Callable[[list[int]], bool] = lambda targets: False,
) -> tuple[list[int], Tensor | None, int]:
    """(of the rows, N x (D + 1 + U), those of which it is not known whether row . [x, 1, r] > TOLERANCE everywhere; an
    adversarial input if one was found; domains visited). `broken` says of inputs (N x D) whether they are adversarial; the
    deadline is one of time.monotonic(). `beside` gets ASIDE of the time, and the numbers of the open rows. Where it answers
    True, the search stops."""
    began, aside, last = time.monotonic(), 0.0, FIRST_ASIDE
    roots = rooted(bounder, rows)
    open_ = Open(rows, roots.take(roots.bound <= TOLERANCE))
    visited, stuck = len(roots), set()
    while True:
        count, now = len(open_), time.monotonic()
        if not count or count > MOST or now > deadline:
            return sorted(stuck | open_.targets()), None, visited
        if aside + last < ASIDE * (now - began):
            if beside(targets := sorted(stuck | open_.targets())):
                return targets, None, visited
            last = time.monotonic() - now
            aside += last
        worst = open_.worst(BATCH[rows.device.type])
        again = torch.isin(worst.depth, torch.tensor(ANEW))
        if again.any():
            told = again & pays(worst)
            worst.put(told, narrow(bounder, renew(bounder, worst.take(told), TOLERANCE)))
            deep = worst.take(again & (worst.bound <= TOLERANCE))
            if len(deep):
                deep = bounder.rebound(deep, TOLERANCE, ANEW_STEPS)
                deep = bounder.tighten(deep, STEPS, RATE, enough=2 * TOLERANCE)
            worst = join(worst.take(~again), deep)
            worst = worst.take(worst.bound <= TOLERANCE)
            if not len(worst):
                continue
        pick, corners = split(bounder, worst)
        near = worst.bound.topk(min(DESCENTS, len(worst)), largest=False).indices
        corners[near] = bounder.descend(worst.rows[near], corners[near].float(), DOWN).double()
        hit = broken(corners)
        if hit.any():
            return [], corners[hit][0], visited
        ends = bounder.tighten(worst.take(pick < 0), END_STEPS, RATE, enough=2 * TOLERANCE)
        for i in (ends.bound <= TOLERANCE).nonzero()[:, 0].tolist():  # nothing to split, and the bound still fails
            seconds, target = deadline - time.monotonic(), ends.target[i].item()
            if target in stuck or seconds < 0:
                stuck.add(target)
                continue
            kind, point = milp.decide(bounder.reduced, ends.rows[i], TOLERANCE, seconds, ends.signs[i], ends.ends[i])
            if kind == "point" and broken(point[None]).item():
                return [], point, visited
            if kind != "verified":
                stuck.add(target)
        open_.drop(stuck)
        going = (pick >= 0) & ~torch.isin(worst.target, torch.tensor(sorted(stuck), dtype=torch.int64))
        if not going.any():
            continue
        worst, pick = worst.take(going), pick[going]
        fresh = follow(bounder, children(worst, pick), TOLERANCE)
        fresh = bounder.tighten(fresh.take(fresh.bound <= TOLERANCE), STEPS, RATE, enough=2 * TOLERANCE)
        near = (fresh.bound <= TOLERANCE) & (fresh.bound > NEAR * roots.bound[fresh.target])
        if near.any():
            fresh = join(fresh.take(~near), bounder.tighten(fresh.take(near), MORE, RATE, enough=2 * TOLERANCE))
        visited += len(fresh)
        open_.add(fresh.take(fresh.bound <= TOLERANCE))
