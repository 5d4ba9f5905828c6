"""Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) for convolutions.

The momentum of a convolution's weights, as a matrix of a row for each output channel, is made nearly orthogonal: all its
singular values become about 1. So a step moves all directions alike. Weights keep the length sqrt(rows), as in the author's
airbench (2024): behind a convolution there should be a BatchNorm, which sees no length. All else (BatchNorms, biases,
linear layers) is moved by SGD.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fastrobust.config.fields import NonNegative, Number, Positive, key
from fastrobust.train.optimizers import Optimizer

FIFTH = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that each step applies: it takes 0.002 to 1 into 0.68 to 1.21
STEPS, OTHERS_MOMENTUM = 5, 0.9


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U V' of the singular value decomposition U S V' of each matrix (K x rows x columns), by Newton-Schulz steps."""
    a, b, c = FIFTH
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


def orthogonal_each(weights: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of the weights of convolutions (rows x channels x H x W each), those of one shape together."""
    found, alike = {}, defaultdict(list)
    for i, w in enumerate(weights):
        alike[w.shape].append(i)
    for (rows, channels, *size), numbers in alike.items():
        # in the order of channels-last memory, which costs no copy; columns may be in any
        matrices = torch.stack([weights[i].permute(0, 2, 3, 1).reshape(rows, -1) for i in numbers])
        made = orthogonal(matrices).unflatten(2, (*size, channels)).permute(0, 1, 4, 2, 3)
        found |= zip(numbers, made.unbind(), strict=True)
    return [found[i] for i in range(len(weights))]


class Steps(torch.optim.Optimizer):
    """The optimiser itself. others: the rate of what is no convolution, as a multiple of lr. A GPU waits for the launches of
    so small kernels: what can be done for all weights at once is."""

    _step_supports_amp_scaling = True  # or a GradScaler would wait for the device

    def __init__(self, groups: list[dict], lr: Tensor, momentum: float, others: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "others": others, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """With a GradScaler's scale and `found_inf`: nothing is moved by gradients that are not finite."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            for rule, of_convolutions in ((self.muon, True), (self.sgd, False)):
                if weights := [p for p in given if (p.dim() == 4) == of_convolutions]:
                    self.replace(weights, *rule(weights, *self.gradients_and_momenta(weights), group))

    def gradients_and_momenta(self, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        gradients, scale = [p.grad for p in weights], getattr(self, "grad_scale", None)
        gradients = gradients if scale is None else torch._foreach_div(gradients, scale)
        return gradients, [self.state[p]["momentum_buffer"] for p in weights]

    def replace(self, weights: list[Tensor], moved: list[Tensor], momenta: list[Tensor]) -> None:
        old, new = [*weights, *(self.state[p]["momentum_buffer"] for p in weights)], [*moved, *momenta]
        if (bad := getattr(self, "found_inf", None)) is None:
            torch._foreach_copy_(old, new)
        else:
            stays = bad > 0
            for t, later in zip(old, new, strict=True):
                torch.where(stays, t, later, out=t)

    def muon(self, weights: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], group: dict) -> tuple:
        """(the weights, their momenta) after a step."""
        momenta = torch._foreach_add(torch._foreach_mul(momenta, group["momentum"]), gradients)
        ahead = torch._foreach_add(torch._foreach_mul(momenta, group["momentum"]), gradients)  # Nesterov's
        kept = torch._foreach_reciprocal(torch._foreach_add(torch._foreach_norm(weights), 1e-12))
        kept = torch._foreach_mul(kept, [len(p) ** 0.5 for p in weights])
        updates = torch._foreach_mul(orthogonal_each(ahead), group["lr"])
        return torch._foreach_sub(torch._foreach_mul(weights, kept), updates), momenta

    def sgd(self, weights: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], group: dict) -> tuple:
        momenta = torch._foreach_add(torch._foreach_mul(momenta, OTHERS_MOMENTUM), gradients)
        momenta = torch._foreach_add(momenta, torch._foreach_mul(weights, group["weight_decay"]))
        rate = group["others"] * group["lr"]
        return torch._foreach_sub(weights, torch._foreach_mul(momenta, rate)), momenta


class Muon(Optimizer):
    weight_decay: NonNegative = key("L2 penalty of all but convolutions, which keep their length", 5e-4)
    momentum: Number = key("momentum of convolutions; of others it is 0.9", 0.6, ge=0, lt=1)
    others: Positive = key("the rate of all but convolutions, as a multiple of the schedule's", 5.0)

    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return Steps(groups, lr, self.momentum, self.others)

    def kept(self) -> tuple[str, ...]:
        return ("momentum_buffer",)
