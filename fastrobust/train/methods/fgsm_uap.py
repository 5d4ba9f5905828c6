"""FGSM-UAP (Pan et al., 2024): FGSM that starts from one perturbation for all images, which training moves along."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import NonNegative, Number, Pixels, key
from fastrobust.config.numbers import describe
from fastrobust.train.learner import Loss
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, Shapes, per_pixel, signs, smoothed


def fgsm_uap(
    learner: Learner, x: Tensor, y: Tensor, u: Tensor, *, threat: Threat, loss: Loss, weight: float, stop_gradient: bool
) -> Tensor:
    """FGSM from the perturbation u (1 or N x C x H x W), and a loss that also asks for the same logits at the start and at
    the end. Its gradient goes through both, or with `stop_gradient` through those at the end alone. Returns the gradient
    at the start, which u is to follow."""
    start = threat.project(u, x)
    gradient, at_start = learner.attack_gradient(x + start, y, loss, keep=not stop_gradient)
    delta = threat.project(threat.step(start, gradient, threat.radius), x)
    learner.update(x + delta, y, lambda logits, y: loss(logits, y) + weight * F.mse_loss(logits, at_start))
    return gradient


Momentum = Annotated[Number, Field(ge=0, lt=1, description="of the gradients that the kept perturbation follows")]
Consistency = Annotated[
    NonNegative,
    Field(description="weight of the mean squared difference between the logits at the start and at the end"),
]
Smoothing = Annotated[Number, Field(ge=0, lt=1, description="of the loss, in attack and update")]
StopGradient = Annotated[
    bool,
    Field(description="`true`: the gradient of the consistency goes through the end alone. Cheaper, and not published"),
]


class FgsmUap(Attacked):
    """State, in units of alpha: u, the universal perturbation, and m, the mean of the gradients that it follows."""

    agreed: ClassVar[tuple[str, ...]] = ("u", "m")
    linf_alone = property(lambda self: f"method {self.name}")
    soft_labels = property(lambda self: True)
    name: Literal["fgsm_uap"]
    alpha: Pixels | None = key("largest entry of the universal perturbation, and its step", None, "1.25 epsilon")
    momentum: Momentum = 0.3
    consistency: Consistency = 10.0
    label_smoothing: Smoothing = 0.4
    stop_gradient: StopGradient = False

    def resolve(self, epsilon: float) -> None:
        self.alpha = 1.25 * epsilon if self.alpha is None else self.alpha

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        u = signs(shapes)
        return {"u": u, "m": torch.zeros_like(u)}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        gradient = self.train(learner, batch, threat.scaled(scale), state["u"] * (self.alpha * scale))
        state["m"].mul_(self.momentum).add_(learner.mean(gradient.mean(0, keepdim=True)))
        state["u"].add_(state["m"].sign()).clamp_(-1, 1)

    def train(self, learner: Learner, batch: Inputs, threat: Threat, u: Tensor) -> Tensor:
        """`fgsm_uap` with the section's settings; its gradient by the batch's mean."""
        options = {"weight": self.consistency, "stop_gradient": self.stop_gradient}
        gradient = fgsm_uap(learner, batch.x, batch.y, u, threat=threat, loss=smoothed(self.label_smoothing), **options)
        return per_pixel(gradient, learner)

    def describe(self) -> str:
        through = ", gradient stopped at the start" if self.stop_gradient else ""
        return f"{self.name}, alpha {describe(self.alpha)}, consistency {self.consistency:g}{through}"
