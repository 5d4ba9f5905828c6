"""SORA (2026, "Free Second-Order Attacks in Fast Adversarial Training"): FGSM whose step grows with how well the gradients
at the start and at the end of the last batch agreed."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import Number, Pixels, Positive, key
from fastrobust.config.numbers import describe
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, Shapes


def sora(learner: Learner, x: Tensor, y: Tensor, *, threat: Threat, alpha: Radius) -> Tensor:
    """FGSM from a random start, every pixel by a random part of alpha, not projected onto the ball. Returns how well the
    gradients at both ends agree (shape []): 1 where the loss rises along a straight line."""
    delta = threat.start(x)
    gradient, _ = learner.attack_gradient(x + delta, y)
    delta = threat.clip(threat.step(delta, gradient, alpha * torch.rand_like(x)), x)
    at_end = learner.update_with_input_gradient(x + delta, y)
    along = (gradient.sign() * at_end).flatten(1).sum(1) / gradient.abs().flatten(1).sum(1)
    return learner.mean(along.nan_to_num(0.0, 0.0, 0.0).mean()).clamp(-1, 1)


class Sora(Attacked):
    """State: `agreement`, the moving mean of what `sora` returns."""

    agreed: ClassVar[tuple[str, ...]] = ("agreement",)
    linf_alone = property(lambda self: f"method {self.name}")
    soft_labels = property(lambda self: True)
    name: Literal["sora"]
    alpha: Pixels | None = key("the largest step", None, "2 epsilon")
    margin: Positive = key(
        "the step is the largest one as long as the agreement of the gradients is above 1 - `margin`", 0.02
    )
    decay: Number = key("of the moving mean of that agreement", 0.95, ge=0, lt=1)

    def resolve(self, epsilon: float) -> None:
        self.alpha = min(1.0, 2 * epsilon) if self.alpha is None else self.alpha

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        return {"agreement": torch.full((), 0.99, device=shapes.device)}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        alpha = self.alpha * scale * (self.margin / (1 - state["agreement"])).clamp(max=1)
        found = sora(learner, batch.x, batch.y, threat=threat.scaled(scale), alpha=alpha)
        state["agreement"].mul_(self.decay).add_((1 - self.decay) * found)

    def describe(self) -> str:
        return f"sora, alpha {describe(self.alpha)}"
