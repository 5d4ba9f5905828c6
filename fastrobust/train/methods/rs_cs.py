"""FGSM-RS-CS (Zhao et al., 2023, "Fast Adversarial Training with Smooth Convergence"): FGSM whose loss at the random start
is held near its mean in the epoch before."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import NonNegative, Number, Pixels, key
from fastrobust.config.numbers import describe
from fastrobust.train.learner import Loss
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, Shapes, smoothed
from fastrobust.train.methods.fgsm_uap import Smoothing


def rs_cs(
    learner: Learner, x: Tensor, y: Tensor, direction, *, threat: Threat, alpha: Radius, attack_loss: Loss, loss: Loss
) -> None:
    """FGSM from a random start, not projected onto the ball; to the loss comes `direction(loss at the start)`, 1, 0 or -1,
    times the loss at the start."""
    delta = threat.start(x)
    gradient, at_start = learner.attack_gradient(x + delta, y, attack_loss, keep=True)
    delta = threat.clip(threat.step(delta, gradient, alpha), x)

    def steadied(logits: Tensor, y: Tensor) -> Tensor:
        start = loss(at_start, y)
        return loss(logits, y) + direction(start.detach()) * start

    learner.update(x + delta, y, steadied)


def soft(share: float, smoothing: float) -> Loss:
    """Cross-entropy with a target of `share` for the label, the others having the rest; label smoothing on top."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        classes = logits.shape[1]
        label = y[:, None] == torch.arange(classes, device=y.device)
        target = torch.where(label, share, (1 - share) / max(1, classes - 1))
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    return loss


class RsCs(Attacked):
    """State: `epoch`, the one that the sums belong to; `sums`, of the losses at the start and of the batches in it; `last`,
    the mean loss of the epoch before."""

    agreed: ClassVar[tuple[str, ...]] = ("epoch", "sums", "last")
    name: Literal["rs_cs"]
    alpha: Pixels | None = key("step size", None, "epsilon")
    threshold: NonNegative = key("how far the loss at the start may be from its mean in the epoch before", 0.03)
    weight: NonNegative = key("of the loss at the start, where that is steadied", 1.0)
    label_share: Number = key("the label's share in the targets, before label smoothing", 0.6, gt=0, le=1)
    label_smoothing: Smoothing = 0.4

    def resolve(self, epsilon: float) -> None:
        self.alpha = epsilon if self.alpha is None else self.alpha

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        zeros = lambda *shape: torch.zeros(shape, device=shapes.device)
        return {"epoch": zeros(), "sums": zeros(2), "last": zeros()}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        epoch, sums, last = state["epoch"], state["sums"], state["last"]
        now = learner.epoch().floor()
        last.copy_(torch.where(now == epoch, last, sums[0] / sums[1].clamp(min=1)))
        sums.copy_(torch.where(now == epoch, sums, 0.0))
        epoch.copy_(now)

        def direction(start: Tensor) -> Tensor:
            """The first two epochs and the last are left alone."""
            start = learner.mean(start)
            sums.add_(torch.stack([start, torch.ones_like(start)]))
            far = ((start - last).abs() > self.threshold) & (now >= 2) & (now <= learner.epochs - 2)
            return self.weight * torch.where(far, (start - last).sign(), 0.0)

        losses = {"attack_loss": smoothed(self.label_smoothing), "loss": soft(self.label_share, self.label_smoothing)}
        rs_cs(learner, batch.x, batch.y, direction, threat=threat.scaled(scale), alpha=self.alpha * scale, **losses)

    def describe(self) -> str:
        return f"rs_cs, alpha {describe(self.alpha)}, threshold {self.threshold:g}"
