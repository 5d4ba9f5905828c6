"""What must hold at the point of a box where a row is least: some inputs are at an end of their range, and the inputs of the
ReLUs lie within bounds (spans). These follow from the fixed inputs, and from how much the row may exceed its lower bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fastrobust.verification.bounds import Bounder, Domains, with_signs
from fastrobust.verification.network import ROUNDING
from fastrobust.verification.reduced import Reduced

PRICES = (0.5, 1, 2, 4)  # of the room in a bound, as multiples of the mean
NEWS, ROUNDS = 0.02, 2  # spans are renewed if so large a share of signs and ends is newly fixed; so often in a row at most
ENDS = 0.01  # spans are renewed only if so large a share of the inputs is fixed at an end


def follow(bounder: Bounder, domains: Domains, tolerance: float) -> Domains:
    """Fix inputs at ends of their ranges, and renew the spans that depend on them, until little changes."""
    domains = narrow(bounder, domains)
    for _ in range(ROUNDS):
        size = domains.signs.shape[1] + domains.ends.shape[1]
        news = domains.settled() - domains.known >= NEWS * size
        news &= (domains.bound <= tolerance) & pays(domains)
        if not news.any():
            break
        domains.put(news, narrow(bounder, renew(bounder, domains.take(news), tolerance)))
    return domains


def pays(domains: Domains) -> Tensor:
    """In which domains enough inputs are fixed for new spans to be worth their time, bool N."""
    return (domains.ends != 0).double().mean(1) > ENDS


def narrow(bounder: Bounder, domains: Domains) -> Domains:
    """Inputs at an end of their range, as far as the slope of the row says so, and what follows for the first layer.

    Where the row is least in the whole box it falls in no direction. An input along which it would fall, with any signs
    of the ReLUs that the domain leaves open, is at its end there. A ReLU that a split made active (inactive) counts so
    in this only if its output does not raise the row: at the border of the domain it may have the other slope, and then
    the row falls all the more."""
    r, size = bounder.reduced.inputs + 1, domains.signs.shape[1]
    weights, sizes = bounder.weights[torch.float64], bounder.sizes
    middle, radius = domains.rows[:, r:].clone(), torch.zeros(len(domains), size, dtype=torch.float64)
    for layer in reversed(bounder.reduced.layers):
        m, w, signs = middle[:, layer], radius[:, layer], domains.signs[:, layer].double()
        if layer.stop < size:
            m.addmm_(middle[:, layer.stop :], weights[layer.stop :, r + layer.start : r + layer.stop])
            w.addmm_(radius[:, layer.stop :], sizes[layer.stop :, r + layer.start : r + layer.stop])
        low, high = m - w, m + w
        sure = ((signs.abs() > 1) | (high <= 0)) * signs.sign()
        active, open_ = sure.clamp(min=0), 1 - sure.abs()
        low, high = low.clamp(max=0) * open_ + low * active, high.clamp(min=0) * open_ + high * active
        torch.add(low, high, out=m).mul_(0.5)
        torch.sub(high, low, out=w).mul_(0.5)
    slope, spread = domains.rows[:, : r - 1] + middle @ weights[:, : r - 1], radius @ sizes[:, : r - 1]
    sure = (slope.abs() - spread > ROUNDING * (1 + spread)) & (domains.ends == 0)
    ends = torch.where(sure, -slope.sign(), domains.ends).to(torch.int8)
    span, first = domains.span.clone(), bounder.reduced.layers[0] if bounder.reduced.layers else slice(0, 0)
    centre = torch.addmm(weights[first, r - 1], ends.double(), weights[first, : r - 1].T)
    reach = (ends == 0).double() @ sizes[first, : r - 1].T + ROUNDING * (1 + centre.abs())
    span[:, 0, first] = torch.maximum(span[:, 0, first], centre - reach)
    span[:, 1, first] = torch.minimum(span[:, 1, first], centre + reach)
    return with_signs(replace(domains, ends=ends, span=span))


def renew(bounder: Bounder, domains: Domains, tolerance: float) -> Domains:
    """Bounds on the inputs of the free ReLUs, from the ends and the spans of each domain. No slope is optimised.

    The row's bound is value + cost . |x - corner|, where the corner is its least point. So in the domain that sum is at
    most the tolerance wherever the row is, and no ReLU's input gets further than such x allow."""
    lines = bounder.lines(domains, domains.low, torch.float64)
    value, _, cost = bounder.below(domains.rows, lines, domains.push.double())
    room = (tolerance - value).clamp(min=0) + ROUNDING * (1 + value.abs())
    for layer in bounder.reduced.layers:
        span = domains.span.clone()
        for place in range(layer.start, layer.stop):
            owner = (domains.signs[:, place] == 0).nonzero()[:, 0]
            if len(owner):
                low, high = local(bounder, place).around(domains, owner, cost, room)
                span[owner, 0, place] = torch.maximum(span[owner, 0, place], low)
                span[owner, 1, place] = torch.minimum(span[owner, 1, place], high)
        domains = with_signs(replace(domains, span=span))
    return replace(domains, known=domains.settled())


def local(bounder: Bounder, place: int) -> Local:
    """All that the input of one ReLU depends on."""
    if place not in bounder.parts:
        bounder.parts[place] = Local(bounder.reduced, place)
    return bounder.parts[place]


class Local:
    """The part of a reduced network that the input of the ReLU `place` depends on: a convolution sees a few pixels."""

    def __init__(self, reduced: Reduced, place: int):
        r = reduced.inputs + 1
        seen = reduced.weights[place] != 0
        for layer in reversed(reduced.layers):
            behind = torch.arange(len(reduced.lower))[layer][seen[r:][layer]]
            seen = seen | (reduced.weights[behind] != 0).any(0)
        self.inputs, self.relus = seen[: r - 1].nonzero()[:, 0], seen[r:].nonzero()[:, 0]
        columns = torch.cat([self.inputs, torch.tensor([r - 1]), self.relus + r])
        stops = [0, *(int((self.relus < layer.stop).sum()) for layer in reduced.layers)]
        self.row = reduced.weights[place][columns]
        self.bounder = Bounder(
            replace(
                reduced,
                weights=reduced.weights[self.relus][:, columns],
                lower=reduced.lower[self.relus],
                upper=reduced.upper[self.relus],
                layers=tuple(slice(a, b) for a, b in pairwise(stops) if a < b),
                kept=reduced.kept[self.inputs],
            )
        )

    def around(self, domains: Domains, owners: Tensor, cost: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on the ReLU's input in the domains with these numbers, one each, where cost . |x - corner| is at most the
        room (cost: N x D, the signs are those of minus the corner)."""
        both = owners.repeat(2)[:, None]  # from below and from above
        span = torch.stack([domains.span[:, side][both, self.relus] for side in (0, 1)], 1)
        low = (span[:, 1] > -span[:, 0]).double()
        ends, signs = domains.ends[both, self.inputs], domains.signs[both, self.relus]
        lines = self.bounder.lines(replace(domains, signs=signs, ends=ends, span=span), low, torch.float64)
        rows = torch.cat([side.expand(len(owners), -1) for side in (self.row, -self.row)])
        value, _, slope = self.bounder.below(rows, lines, torch.zeros_like(low))
        cost, room = cost[both, self.inputs], room[both[:, 0]]
        away = 2 * (slope * cost).sign().clamp(max=0).neg() * lines.free  # to the end that the bound on the row dislikes
        gain, dear = slope.abs() * away, cost.abs() * away
        mean = gain.sum(1) / dear.sum(1).clamp(min=1e-12)
        price = gain.new_tensor(PRICES)[:, None] * mean  # any price of room gives a bound
        saved = torch.minimum(gain, price[:, :, None] * dear).sum(2) - price * room
        value = value + saved.max(0).values.clamp(min=0) - ROUNDING * (1 + value.abs())
        low, high = value.split(len(owners))
        return low, -high
