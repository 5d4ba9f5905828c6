"""Networks with the same weights and other code are told apart by what they answer on two fixed images. The weights' digest
does not see another activation, scale or layer without weights: what is kept about a network has its answers beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastrobust.attack.verdicts import evaluating, plain_fp32

CLOSE = 0.02  # of the largest answer: devices differ by far less


def answers(model: nn.Module, shape: Sequence[int]) -> list[float]:
    """The logits on two images of noise, C x H x W, and the length of each one's gradient of the cross-entropy with class 0
    (none: 0)."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # for models that draw numbers
        x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        with evaluating(model), plain_fp32(), torch.enable_grad():
            logits, gradient = model(x).float(), torch.zeros_like(x)
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), x)
    lengths = gradient.flatten(1).norm(dim=1)
    return [float(f"{value:.5g}") for value in (*logits.flatten().tolist(), *lengths.tolist())]


def alike(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether these are the answers of one network. Results of earlier versions have none, and are believed."""
    if one is None or other is None:
        return True
    if len(one) != len(other):
        return False
    parts = ((one[:-2], other[:-2]), (one[-2:], other[-2:]))  # logits and gradients have scales of their own
    return all(abs(a - b) <= CLOSE * max(map(abs, (*p, *q))) for p, q in parts for a, b in zip(p, q, strict=True))
