"""N-AAER (Lin et al., 2023, "Abnormal Adversarial Examples Regularization"): N-FGSM, and a loss against examples that the
attack has made easier."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import NonNegative, Pixels, key
from fastrobust.config.numbers import describe
from fastrobust.train.learner import Loss
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale
from fastrobust.train.methods.n_fgsm import Noise


def n_aaer(
    learner: Learner, x: Tensor, y: Tensor, *, noise: Threat, alpha: Radius, weights: tuple[float, float, float]
) -> None:
    """N-FGSM, whose loss has one more term that depends on the logits at the start."""
    delta = noise.start(x)
    gradient, at_start = learner.attack_gradient(x + delta, y)
    delta = noise.clip(noise.step(delta, gradient, alpha), x)
    learner.update(x + delta, y, against_abnormal(at_start, learner, *weights))


def against_abnormal(at_start: Tensor, learner: Learner, all_of_it: float, loss_weight: float, change_weight: float) -> Loss:
    """Cross-entropy plus the regularisation: an example is abnormal where its loss was higher at the start. What is summed
    over abnormal examples and divided by the batch is the mean over the abnormal times their share; the means that are
    compared are those of all processes."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        before, after = (F.cross_entropy(z, y, reduction="none") for z in (at_start, logits))
        change = (logits - at_start).square().sum(1)
        abnormal = (before > after).float()
        sums = torch.stack([abnormal, 1 - abnormal, abnormal * change, (1 - abnormal) * change]).detach().mean(1)
        count, others, of_abnormal, of_normal = learner.mean(sums)
        normal_change = of_normal / others.clamp(min=1e-9)
        larger = of_abnormal > normal_change * count
        harder = loss_weight * (before - after) + change_weight * larger * (change - normal_change)
        return learner.loss(logits, y) + all_of_it * (others > 0) * (abnormal * harder).mean()

    return loss


class NAaer(Attacked):
    soft_labels = property(lambda self: True)
    name: Literal["n_aaer"]
    noise: Noise = 2.0
    alpha: Pixels | None = key("step size", None, "epsilon")
    weight: NonNegative = key("of the whole regularisation (λ1)", 1.0)
    loss_weight: NonNegative = key("of how much the loss of abnormal examples fell (λ2)", 1.5)
    change_weight: NonNegative = key("of how much more their logits moved than those of the others (λ3)", 0.15)

    def resolve(self, epsilon: float) -> None:
        self.alpha = epsilon if self.alpha is None else self.alpha

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        noise, weights = threat.scaled(self.noise).scaled(scale), (self.weight, self.loss_weight, self.change_weight)
        n_aaer(learner, batch.x, batch.y, noise=noise, alpha=self.alpha * scale, weights=weights)

    def describe(self) -> str:
        return f"n_aaer, noise {self.noise:g} epsilon, alpha {describe(self.alpha)}, weight {self.weight:g}"
