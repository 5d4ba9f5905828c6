"""Lower bounds on rows over the box of a reduced network: linear relaxations carried backward to the input (CROWN, Zhang et
al., 2018) with optimised slopes (alpha-CROWN, Xu et al., 2021) and multipliers for the ReLUs whose sign is fixed
(beta-CROWN, Wang et al., 2021).

Slopes and multipliers are optimised in single precision; the bound that they give is then computed in double precision,
and only that one counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastrobust.verification.reduced import ROUNDING, Matrices, Reduced


def relu_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ReLU over [lower, upper] lies under slope * z + offset and over low * z: (slope, offset, low). For an unstable
    one `low` is 0 or 1, whichever leaves the smaller triangle."""
    up, down = upper.clamp(min=0), lower.clamp(max=0)
    slope = up / (up - down).clamp(min=1e-30)
    return slope, -slope * down, ((up > -down) | (lower >= 0)).to(lower.dtype)


@dataclass
class Domains:
    """N domains. rows: the question of each, float64 N x (D + 1 + U). signs: int8 N x U, +1 fixed active, -1 fixed inactive,
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
        r = self.reduced.inputs + 1  # where the ReLUs begin
        total, coefficients = 0, []
        for layer in reversed(self.reduced.layers):
            mine = rows[:, r + layer.start : r + layer.stop]
            coefficients.append(mine)
            positive, negative = mine.clamp(min=0), mine.clamp(max=0)
            total = total + (negative * offset[:, layer]).sum(1)
            mine = positive * line[:, layer] + negative * slope[:, layer] + pushes[:, layer]
            rows = rows + mine @ weights[layer]
        x = rows[:, : r - 1]
        total = total + rows[:, r - 1] + x.clamp(min=0) @ x_low + x.clamp(max=0) @ x_high
        return total, torch.cat([*coefficients[::-1], rows[:, :0]], 1), x

    def root(self, rows: Tensor) -> Domains:
        """One domain per row (N x (D + 1 + U)), nothing fixed."""
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


def surround(matrices: Matrices, box: tuple[Tensor, Tensor], steps: int = 0) -> Reduced:
    """The network around a box of inputs (flat, normalised pixels), its last layer left out. The inputs of the ReLUs are
    bounded layer by layer: by intervals, where those leave the sign open by linear relaxation, and where that does by
    one whose slopes are optimised for `steps` steps."""
    around = Reduced.start(box)
    lower, upper = (side.numpy() for side in box)
    for k in range(len(matrices) - 1):
        z = around.after(matrices.weights[k], matrices.shifts[k])
        lower, upper = matrices.interval(k, lower, upper)
        bounder = Bounder(around)
        for effort in [0, steps] if steps else [0]:
            open_ = ((lower < 0) & (upper > 0)).nonzero()[0]
            if k == 0 or not len(open_):  # the first layer's intervals are exact
                break
            rows = torch.from_numpy(z[open_].toarray())
            found = bounder.tighten(bounder.root(torch.cat([rows, -rows])), effort).bound.numpy() - ROUNDING
            lower[open_] = lower[open_].clip(min=found[: len(open_)])
            upper[open_] = upper[open_].clip(max=-found[len(open_) :])
        around = around.extend(z, lower, upper)
        lower, upper = lower.clip(min=0), upper.clip(min=0)
    return around
