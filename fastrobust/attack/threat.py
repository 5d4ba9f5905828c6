"""The threat model: an L-infinity ball of radius epsilon around an image, cut with the pixel box [0, 1].

Pure functions on tensors, and `Threat`, which holds norm and radius and is what all other code uses. Images x and
perturbations delta have one shape, N x C x H x W; pixels are in [0, 1], and so epsilon and alpha are fractions of that range
(8/255 = 0.0314). Both may be numbers or tensors with one element, which a schedule can change from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Threat:
    """All points within `radius` (pixels in [0, 1]) of an image in the L-infinity norm that lie in the pixel box. Another
    norm is another class with these methods. kernels: what training does most runs as Triton's kernels, with the same
    numbers."""

    radius: Radius
    kernels: bool = False
    norm = "Linf"

    def scaled(self, factor: Radius) -> Threat:
        return replace(self, radius=self.radius * factor)

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        """The nearest perturbation in the ball and the box."""
        return project(delta, x, self.radius)

    def clip(self, delta: Tensor, x: Tensor) -> Tensor:
        """The nearest perturbation in the box."""
        return clip_to_box(delta, x)

    def start(self, x: Tensor, clip: bool = True) -> Tensor:
        """A random perturbation, uniform in the ball; with `clip`, cut with the box."""
        if self.kernels and _kernels().alike(x):
            return _kernels().start(torch.rand_like(x), x, self.radius, clip)
        return uniform_start(x, self.radius, clip)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Random perturbations, uniform in the ball, that depend on the generator alone and are on its device."""
        return torch.empty(shape, device=generator.device).uniform_(-self.radius, self.radius, generator=generator)

    def step(self, delta: Tensor, gradient: Tensor, alpha: Radius) -> Tensor:
        """delta after the step of size alpha that raises the loss most, by its gradient."""
        return signed_step(delta, gradient, alpha)

    def climb(self, delta: Tensor, gradient: Tensor, alpha: Radius, x: Tensor, project: bool = True) -> Tensor:
        """`step`, then `project`; without it, `clip`."""
        if self.kernels and _kernels().alike(delta, gradient, x):
            return _kernels().climb(delta, gradient, x, alpha, self.radius if project else None)
        moved = self.step(delta, gradient, alpha)
        return self.project(moved, x) if project else self.clip(moved, x)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value of every pixel."""
        return box(x, self.radius)

    def nearest(self, points: Tensor, x: Tensor) -> Tensor:
        """The nearest points to `points` that the adversary of x may show."""
        return torch.minimum(torch.maximum(points, x - self.radius), x + self.radius).clamp(0, 1)

    def contains(self, points: Tensor, x: Tensor, tolerance: float = 0.0) -> Tensor:
        """Which of the points the adversary of x may show (bool, N): no pixel is further than `tolerance` from one that is
        allowed."""
        return ((points - self.nearest(points, x)).abs() <= tolerance).flatten(1).all(1)


def _kernels():
    from fastrobust.attack import threat_kernels  # needs Triton

    return threat_kernels
