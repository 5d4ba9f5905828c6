"""The threat model: a ball of radius epsilon around an image, in the L-infinity or the L2 norm, cut with the box [0, 1].

Pure functions on tensors, and the balls `Threat` (L-infinity) and `L2`, which hold norm and radius and are what all other
code uses. Images x and perturbations delta have one shape, N x C x H x W; pixels are in [0, 1], and so epsilon and alpha are
in units of that range (L-infinity 8/255 = 0.0314, L2 128/255 = 0.5). Both may be numbers or tensors with one element, which
a schedule can change from step to step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastrobust.config.hints import did_you_mean
from fastrobust.models.pixels import Sees
from fastrobust.runtime.errors import ConfigError

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
    norm is another class with these methods, and a name in `NORMS`. kernels: what training does most runs as Triton's
    kernels, with the same numbers; in L-infinity alone. sees: the network for which these kernels make points ready."""

    radius: Radius
    kernels: bool = False
    sees: Sees | None = field(default=None, compare=False)
    norm = "linf"

    @staticmethod
    def widest(shape: tuple[int, ...]) -> float:
        """The radius from which on the ball of any image (C x H x W) holds the whole box."""
        return 1.0

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
            return _kernels().start(torch.rand_like(x), x, self.radius, clip, self.sees)
        return uniform_start(x, self.radius, clip)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Random perturbations, uniform in the ball, that depend on the generator alone and are on its device."""
        return torch.empty(shape, device=generator.device).uniform_(-self.radius, self.radius, generator=generator)

    def step(self, delta: Tensor, gradient: Tensor, alpha: Radius) -> Tensor:
        """delta after the step of size alpha that raises the loss most, by its gradient."""
        return signed_step(delta, gradient, alpha)

    def climb(self, delta: Tensor, gradient: Tensor, alpha: Radius, x: Tensor, project: bool = True) -> Tensor:
        """`step`, then `project`; without it, `clip`."""
        if self.kernels and self.norm == "linf" and _kernels().alike(delta, x, gradient=gradient):
            return _kernels().climb(delta, gradient, x, alpha, self.radius if project else None, self.sees)
        moved = self.step(delta, gradient.to(delta.dtype), alpha)
        return self.project(moved, x) if project else self.clip(moved, x)

    @staticmethod
    def point(x: Tensor, delta: Tensor) -> Tensor:
        """x + delta; or the same as the network sees it (`Seen`), if the kernel that made delta of x has made that too. A
        gradient with respect to it has the signs of one with respect to x + delta."""
        return x + delta if (seen := getattr(delta, "seen", None)) is None else seen

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


def l2_norm(delta: Tensor) -> Tensor:
    """The norm of each perturbation, N x 1 x 1 x 1, summed pairwise: of 150,000 pixels in fp32 to 1e-7 of it."""
    return delta.square().sum((1, 2, 3), keepdim=True).sqrt()


def project_l2(delta: Tensor, x: Tensor, epsilon: Radius) -> Tensor:
    """A perturbation with ||delta||_2 <= epsilon and x + delta in [0, 1]: scaled back to the ball, then cut with the box,
    which only shortens it further. It lies in both, but is not always the nearest that does: usual practice (APGD of
    AutoAttack, PGDL2 of torchattacks); the exact projection would need a search."""
    return clip_to_box(delta * (epsilon / l2_norm(delta).clamp(min=TINY)).clamp(max=1), x)


def uniform_in_l2(normal: Tensor, uniform: Tensor, radius: Radius) -> Tensor:
    """delta, uniform in the ball, out of normal numbers (as delta) and uniform ones (N x 1 x 1 x 1): a direction, and the
    distance that leaves equal volumes the same chance. With many pixels nearly all of it is near the sphere."""
    return normal * (radius * uniform ** (1 / normal[0].numel()) / l2_norm(normal).clamp(min=TINY))


def normalized_step(delta: Tensor, gradient: Tensor, alpha: Radius) -> Tensor:
    """delta + alpha gradient / ||gradient||_2. An image whose gradient is zero stays where it is; what is not a number
    counts as zero. Gradients are first divided by their largest element, so that squares of tiny ones do not vanish."""
    gradient = gradient.nan_to_num()
    gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=TINY)
    return delta + alpha * (gradient / l2_norm(gradient).clamp(min=1))


TINY = torch.finfo(torch.float32).tiny


class L2(Threat):
    """All points within `radius` of an image in the L2 norm, over all its pixels and channels, that lie in the pixel box."""

    norm = "l2"

    @staticmethod
    def widest(shape: tuple[int, ...]) -> float:
        return math.sqrt(math.prod(shape))

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        """A perturbation in the ball and the box (see `project_l2`)."""
        return project_l2(delta, x, self.radius)

    def start(self, x: Tensor, clip: bool = True) -> Tensor:
        delta = uniform_in_l2(torch.randn_like(x), torch.rand_like(x[:, :1, :1, :1]), self.radius)
        return clip_to_box(delta, x) if clip else delta

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        normal = torch.randn(shape, generator=generator, device=generator.device)
        uniform = torch.rand((shape[0], 1, 1, 1), generator=generator, device=generator.device)
        return uniform_in_l2(normal, uniform, self.radius)

    def step(self, delta: Tensor, gradient: Tensor, alpha: Radius) -> Tensor:
        return normalized_step(delta, gradient, alpha)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise ConfigError("norm: bounds over a box exist for the L-infinity ball alone, and this one is L2: use norm: linf")

    def nearest(self, points: Tensor, x: Tensor) -> Tensor:
        """The points, moved into the ball and the box as `project` does, with the norm in double precision."""
        moved = project_l2(points.double() - x.double(), x.double(), self.radius)
        return (x.double() + moved).to(points.dtype).clamp(0, 1)

    def contains(self, points: Tensor, x: Tensor, tolerance: float = 0.0) -> Tensor:
        """Which of the points the adversary of x may show (bool, N): neither its distance from x nor any of
        its pixels is further than `tolerance` beyond what is allowed."""
        near = l2_norm(points.double() - x.double()).flatten() <= self.radius + tolerance
        return near & ((points - points.clamp(0, 1)).abs() <= tolerance).flatten(1).all(1)


NORMS = {kind.norm: kind for kind in (Threat, L2)}


def ball(norm: str, radius: Radius, kernels: bool = False, sees: Sees | None = None) -> Threat:
    """The threat of this norm, `linf` or `l2`. Raises ConfigError."""
    if norm not in NORMS:
        raise ConfigError(f"norm: '{norm}' is not one of {', '.join(NORMS)}{did_you_mean(str(norm), NORMS)}")
    return NORMS[norm](radius, kernels, sees)


def _kernels():
    from fastrobust.attack import threat_kernels  # needs Triton

    return threat_kernels
