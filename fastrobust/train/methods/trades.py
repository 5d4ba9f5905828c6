"""TRADES (Zhang et al., 2019): accuracy on the images, and the same probabilities all over the ball."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import Count, NonNegative, Pixels, key
from fastrobust.config.numbers import describe
from fastrobust.train.methods.base import Attacked, BatchNorm, Inputs, Learner, Scale

NOISE = 0.001  # standard deviation of the start


def trades(learner: Learner, x: Tensor, y: Tensor, *, threat: Threat, alpha: Radius, steps: int, beta: float) -> None:
    """The attack climbs KL(p(x) || p(x + delta)); the loss is that of the images plus beta times that divergence."""
    at_x = learner.attack_logits(x).softmax(1)
    delta = NOISE * torch.randn_like(x)
    for _ in range(steps):
        gradient, _ = learner.attack_gradient(x + delta, y, lambda logits, y: divergence(at_x, logits))
        delta = threat.project(threat.step(delta, gradient, alpha), x)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        clean = learner.forward(x)
        return learner.loss(clean, y) + beta * divergence(clean.softmax(1), logits)

    learner.update(x + delta, y, loss)


def divergence(p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)), the mean over the examples. p: probabilities, N x classes."""
    return F.kl_div(logits.log_softmax(1), p, reduction="batchmean")


class Trades(Attacked):
    one_step: ClassVar[bool] = False
    splits: ClassVar[bool] = True
    soft_labels = property(lambda self: True)
    name: Literal["trades"]
    steps: Count = key("number of steps", 10)
    alpha: Pixels | None = key("step size", None, "epsilon / 4")
    beta: NonNegative = key("weight of the divergence", 6.0)
    attack_batchnorm: BatchNorm = "eval"

    def resolve(self, epsilon: float) -> None:
        self.alpha = epsilon / 4 if self.alpha is None else self.alpha

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        options = {"alpha": self.alpha * scale, "steps": self.steps, "beta": self.beta}
        trades(learner, batch.x, batch.y, threat=threat.scaled(scale), **options)

    def describe(self) -> str:
        return f"trades, beta {self.beta:g}, {self.steps} steps, alpha {describe(self.alpha)}"
