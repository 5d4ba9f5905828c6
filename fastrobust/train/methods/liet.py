"""LIET (Pan et al., "Mitigating Catastrophic Overfitting in Fast Adversarial Training via Label Information Elimination"):
FGSM that starts from what the model itself connects with the label, mixed with noise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import Count, NonNegative, Number, Positive, key
from fastrobust.train.learner import Loss
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, Shapes
from fastrobust.train.methods.fgsm_uap import StopGradient

Share = Annotated[Number, Field(ge=0, le=1)]
LARGE = "where epsilon is above 8/255"


def liet(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    information: Tensor,
    *,
    threat: Threat,
    noise: Threat,
    noisy: tuple[float, float],
    project: bool,
    loss: Loss,
    weight: Tensor,
    stop_gradient: bool,
) -> None:
    """FGSM from +information or -information (N x C x H x W, one sign for the batch), of which a share between the two
    numbers of `noisy` is replaced with noise; the loss also asks for the same probabilities at the start and at the end."""
    share = noisy[0] + (noisy[1] - noisy[0]) * torch.rand((), device=x.device)
    start = torch.where(torch.rand_like(x) < share, noise.start(x, clip=False), information)
    start = threat.clip(torch.where(torch.rand((), device=x.device) < 0.5, -start, start), x)
    gradient, at_start = learner.attack_gradient(x + start, y, loss, keep=not stop_gradient)
    delta = threat.step(start, gradient, threat.radius)
    delta = threat.project(delta, x) if project else threat.clip(delta, x)
    learner.update(x + delta, y, lambda logits, y: loss(logits, y) + weight * divergence(logits, at_start))


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of the probabilities of two batches of logits, by example."""
    p, q = a.softmax(1), b.softmax(1)
    middle = ((p + q) / 2).clamp(min=1e-12).log()
    return (F.kl_div(middle, p, reduction="batchmean") + F.kl_div(middle, q, reduction="batchmean")) / 2


def randomly_smoothed(amount: float) -> Loss:
    """Cross-entropy with a target of 1 - amount for the label; the others share amount at random, anew in every call."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        label = (y[:, None] == torch.arange(logits.shape[1], device=y.device)).float()
        others = torch.rand_like(logits) * (1 - label)
        return F.cross_entropy(logits, (1 - amount) * label + amount * others / others.sum(1, keepdim=True))

    return loss


class Liet(Attacked):
    """State: `information`, classes x C x H x W, the signs of the loss's gradient at a grey image of each label; `count`,
    the steps so far. The paper looks at all classes in every 20th step; here each step looks at its share of them, so that
    all steps are alike, and every class is looked at in every 20th."""

    agreed: ClassVar[tuple[str, ...]] = ("information", "count")
    linf_alone = property(lambda self: f"method {self.name}")
    name: Literal["liet"]
    noise: Positive | None = key(
        "the noise in the start is uniform in a ball of `noise` × epsilon",
        None,
        f"1; 2 {LARGE}",
        values="a factor above 0",
    )
    project: bool | None = key("projection onto the ball after the step", None, f"true; false {LARGE}")
    noisy: tuple[Share, Share] | None = key(
        "least and largest share of the start that is noise, drawn for each batch",
        None,
        f"0.1 and 0.5; 0 and 1 {LARGE}",
        values="two shares, from 0 to 1",
    )
    every: Count | None = key(
        "steps after which the label information of a class is computed again", None, f"20; 10 {LARGE}"
    )
    consistency: NonNegative | None = key(
        "weight, in the last epoch, of the divergence between the probabilities there. It grows from epoch to epoch",
        None,
        f"100; 20 {LARGE}",
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] | None = key(
        "of the loss, in attack and update; the other classes share it at random", None, f"0.6; 0.4 {LARGE}"
    )
    stop_gradient: StopGradient = False

    def resolve(self, epsilon: float) -> None:
        keys = ("noise", "project", "noisy", "every", "consistency", "label_smoothing")
        small, large = (1.0, True, (0.1, 0.5), 20, 100.0, 0.6), (2.0, False, (0.0, 1.0), 10, 20.0, 0.4)
        for name, default in zip(keys, large if epsilon > 8 / 255 + 1e-6 else small, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, default)

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        information = torch.zeros(shapes.classes, *shapes.batch[1:], device=shapes.device)
        return {"information": information, "count": torch.zeros((), dtype=torch.int64, device=shapes.device)}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        threat, loss = threat.scaled(scale), randomly_smoothed(self.label_smoothing)
        self.look(learner, state["information"], state["count"], loss)
        liet(
            learner,
            batch.x,
            batch.y,
            state["information"][batch.y] * threat.radius,
            threat=threat,
            noise=threat.scaled(self.noise),
            noisy=self.noisy,
            project=self.project,
            loss=loss,
            weight=self.consistency * (learner.epoch().floor() + 1) / learner.epochs,
            stop_gradient=self.stop_gradient,
        )

    def look(self, learner: Learner, information: Tensor, count: Tensor, loss: Loss) -> None:
        """Bring this step's share of the classes up to date, in eval mode."""
        classes = len(information)
        share = -(-classes // self.every)
        turn = count % self.every * share + torch.arange(share, device=count.device)
        grey = torch.full((share, *information.shape[1:]), 0.5, device=information.device)
        gradient, _ = learner.attack_gradient(grey, turn % classes, loss, mode="eval")
        due = (turn < classes)[:, None, None, None]
        new = torch.where(due, learner.mean(gradient).sign(), information[turn % classes])
        information.index_copy_(0, turn % classes, new)
        count.add_(1)

    def describe(self) -> str:
        through = ", gradient stopped at the start" if self.stop_gradient else ""
        return f"liet, consistency {self.consistency:g}, label smoothing {self.label_smoothing:g}{through}"
