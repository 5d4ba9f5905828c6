"""Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) for convolutions.

The momentum of a convolution's weights, as a matrix of a row for each output channel, is made nearly orthogonal: all its
singular values become about 1. So a step moves all directions alike. Weights keep the length sqrt(rows), as in the author's
airbench (2024): behind a convolution there should be a BatchNorm, which sees no length. All else (BatchNorms, biases,
linear layers) is moved by SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrobust.config.fields import NonNegative, Number, Positive, key
from fastrobust.train.optimizers import Optimizer

FIFTH = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that each step applies: it takes 0.002 to 1 into 0.68 to 1.21
STEPS, OTHERS_MOMENTUM = 5, 0.9


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U V' of the singular value decomposition U S V', by Newton-Schulz steps."""
    a, b, c = FIFTH
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-12)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T


class Steps(torch.optim.Optimizer):
    """The optimiser itself. others: the rate of what is no convolution, as a multiple of lr."""

    _step_supports_amp_scaling = True  # or a GradScaler would wait for the device

    def __init__(self, groups: list[dict], lr: Tensor, momentum: float, others: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "others": others, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """With a GradScaler's scale and `found_inf`: nothing is moved by gradients that are not finite."""
        scale, bad = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad if scale is None else p.grad / scale
                moved = self.muon(p, g, group) if p.dim() == 4 else self.sgd(p, g, group)
                for old, new in zip((p, self.state[p]["momentum_buffer"]), moved, strict=True):
                    old.copy_(new if bad is None else torch.where(bad > 0, old, new))

    def muon(self, p: Tensor, g: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        """(the weights, their momentum) after a step."""
        momentum = group["momentum"] * self.state[p]["momentum_buffer"] + g
        ahead = g + group["momentum"] * momentum  # Nesterov's
        update = orthogonal(ahead.flatten(1)).view_as(p)
        return p * (len(p) ** 0.5 / (p.norm() + 1e-12)) - group["lr"] * update, momentum

    def sgd(self, p: Tensor, g: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        momentum = OTHERS_MOMENTUM * self.state[p]["momentum_buffer"] + g + group["weight_decay"] * p
        return p - group["others"] * group["lr"] * momentum, momentum


class Muon(Optimizer):
    weight_decay: NonNegative = key("L2 penalty of all but convolutions, which keep their length", 5e-4)
    momentum: Number = key("momentum of convolutions; of others it is 0.9", 0.6, ge=0, lt=1)
    others: Positive = key("the rate of all but convolutions, as a multiple of the schedule's", 5.0)

    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return Steps(groups, lr, self.momentum, self.others)

    def kept(self) -> tuple[str, ...]:
        return ("momentum_buffer",)
