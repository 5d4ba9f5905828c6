"""GradAlign (Andriushchenko and Flammarion, 2020): FGSM, and a loss against gradients that turn within the ball."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import NonNegative, key
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale


def gradalign(learner: Learner, x: Tensor, y: Tensor, *, threat: Threat, weight: float) -> None:
    """FGSM from x itself. To the loss comes weight (1 - cos(gradient at x, gradient at a random point)), whose gradient goes
    through the second of them."""
    gradient, _ = learner.attack_gradient(x, y)
    delta = threat.project(threat.step(torch.zeros_like(x), gradient, threat.radius), x)
    other, _ = learner.attack_gradient(x + threat.start(x), y, twice=True)
    learner.update(x + delta, y, lambda z, y: learner.loss(z, y) + weight * (1 - cosine(gradient, other, learner)))


def cosine(a: Tensor, b: Tensor, learner: Learner) -> Tensor:
    """The mean over the examples of the cosine between their rows of a and b; rows of zeros are left out."""
    a, b = a.flatten(1), b.flatten(1)
    norms = a.norm(dim=1) * b.norm(dim=1)
    count = learner.mean((norms > 0).float().mean())
    return torch.where(norms > 0, (a * b).sum(1) / norms.clamp(min=1e-30), 0.0).mean() / count.clamp(min=1e-9)


class GradAlign(Attacked):
    linf_alone = property(lambda self: f"method {self.name}")
    soft_labels = property(lambda self: True)
    name: Literal["gradalign"]
    weight: NonNegative | None = key("of the regularisation", None, "0.02 × 10^(epsilon / (8/255)), at most 2")

    def resolve(self, epsilon: float) -> None:
        published = min(epsilon, 16 / 255)
        self.weight = 0.02 * math.pow(10, published / (8 / 255)) if self.weight is None else self.weight

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        gradalign(learner, batch.x, batch.y, threat=threat.scaled(scale), weight=self.weight)

    def describe(self) -> str:
        return f"gradalign, weight {self.weight:.3g}"
