"""PGD adversarial training (Madry et al., 2018)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import Count, Pixels, key
from fastrobust.config.numbers import describe
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, start


def pgd(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    *,
    threat: Threat,
    alpha: Radius,
    steps: int,
    init: str = "random",
    skip_misclassified: bool = False,
) -> None:
    """PGD adversarial training (paper, Algorithm 1). With `skip_misclassified` an example that is already misclassified
    does not move (the authors' MNIST code)."""
    delta = start(x, None, threat, init)
    for _ in range(steps):
        gradient, logits = learner.attack_gradient(threat.point(x, delta), y)
        moved = threat.climb(delta, gradient, alpha, x)
        delta = torch.where((logits.argmax(1) == y)[:, None, None, None], moved, delta) if skip_misclassified else moved
    learner.update(threat.point(x, delta), y)


class Pgd(Attacked):
    one_step: ClassVar[bool] = False
    splits: ClassVar[bool] = True
    soft_labels = property(lambda self: not self.skip_misclassified)
    name: Literal["pgd"]
    steps: Count = key("number of steps", 7)
    alpha: Pixels = key("step size")
    init: Literal["random", "zero"] = key("start of the perturbation: uniform in the ball, or zero", "random")
    skip_misclassified: bool = key(
        "an example that is misclassified already does not move. `true` is the authors' MNIST code", False
    )

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        options = {"steps": self.steps, "init": self.init, "skip_misclassified": self.skip_misclassified}
        pgd(learner, batch.x, batch.y, threat=threat.scaled(scale), alpha=self.alpha * scale, **options)

    def describe(self) -> str:
        return f"pgd-{self.steps}, alpha {describe(self.alpha)}"
