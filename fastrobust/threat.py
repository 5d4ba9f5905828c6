"""The threat model: an L-infinity ball of radius epsilon around an image, cut with the pixel box [0, 1].

Pure functions on tensors. Images x and perturbations delta have one shape, N x C x H x W; pixels are in [0, 1], and so
epsilon and alpha are fractions of that range (8/255 = 0.0314). Both may be numbers or tensors with one element, which a
schedule can change from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

Radius = float | Tensor


def project(delta: Tensor, x: Tensor, epsilon: Radius) -> Tensor:
    """The nearest perturbation (in every pixel) with |delta| <= epsilon and x + delta in [0, 1]: clamp to [-epsilon,
    epsilon], then to [-x, 1 - x]."""
    return clip_to_box(delta.clamp(-epsilon, epsilon), x)


def clip_to_box(delta: Tensor, x: Tensor) -> Tensor:
    """The nearest perturbation with x + delta in [0, 1]."""
    return torch.minimum(torch.maximum(delta, -x), 1 - x)


def box(x: Tensor, epsilon: Radius) -> tuple[Tensor, Tensor]:
    """All that the adversary may do: the least and the largest value of every pixel."""
    return (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)


def uniform_start(x: Tensor, radius: Radius, clip: bool = True) -> Tensor:
    """delta ~ U(-radius, radius) in every pixel (paper, Algorithm 3); with `clip`, cut with the pixel box."""
    delta = (torch.rand_like(x) * 2 - 1) * radius
    return clip_to_box(delta, x) if clip else delta


def signed_step(delta: Tensor, gradient: Tensor, alpha: Radius) -> Tensor:
    """delta + alpha sign(gradient). A pixel whose gradient is zero, or not a number, stays where it is."""
    return delta + alpha * gradient.sign()
