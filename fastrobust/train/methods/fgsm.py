"""FGSM adversarial training: the paper's method."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import Number, Pixels, key
from fastrobust.config.numbers import describe
from fastrobust.train import interval_bounds
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, Shapes, start


def fgsm(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    delta: Tensor | None,
    *,
    threat: Threat,
    alpha: Radius,
    init: str = "random",
    clip_start: bool = True,
    ibp_weight: float = 0.0,
) -> Tensor:
    """FGSM adversarial training (paper, Algorithm 3; section 4.1 for the three starts). Returns delta, which the start
    `previous` takes up in the next minibatch.

    The gradient is taken at x + delta itself: no clamp stands inside the differentiated graph, so saturated pixels have a
    gradient too. Without `clip_start` it is taken where a random start lies, even outside the pixel box, as Algorithm 3
    has it. With `ibp_weight` the update's loss is (1 - ibp_weight) times that of the adversarial examples plus ibp_weight
    times a bound on that of all points within epsilon (MTL-IBP; De Palma et al., 2024): such networks can be proved
    robust."""
    delta = start(x, delta, threat, init, clip_start)
    gradient, _ = learner.attack_gradient(threat.point(x, delta), y)
    delta = threat.climb(delta, gradient, alpha, x)
    if not ibp_weight:
        learner.update(threat.point(x, delta), y)
        return delta

    def with_bound(logits: Tensor, y: Tensor) -> Tensor:
        bound = F.cross_entropy(interval_bounds.worst_differences(learner.model, *threat.box(x), y), y)
        return torch.lerp(learner.loss(logits, y), bound, ibp_weight)

    learner.update(x + delta, y, with_bound)
    return delta


class Fgsm(Attacked):
    splits: ClassVar[bool] = True
    by_slot: ClassVar[tuple[str, ...]] = ("delta",)
    soft_labels = property(lambda self: not self.ibp_weight)
    name: Literal["fgsm"]
    init: Literal["random", "zero", "previous"] = key(
        "start of the perturbation: uniform in the ball, zero, or the perturbation of the minibatch before", "random"
    )
    alpha: Pixels | None = key("step size", None, "1.25 epsilon")
    clip_start: bool = key(
        "cut a random start with the pixel box. The authors' CIFAR-10 code does, their MNIST code does not", True
    )
    ibp_weight: Number = key(
        "share of the loss that is a bound over the whole ball "
        "([verification.md](verification.md#networks-that-can-be-proved))",
        0.0,
        ge=0,
        le=1,
    )

    @property
    def one_step(self) -> bool:
        return not self.ibp_weight

    @property
    def reads_weights(self) -> bool:
        return self.ibp_weight > 0

    def resolve(self, epsilon: float) -> None:
        self.alpha = 1.25 * epsilon if self.alpha is None else self.alpha

    @property
    def linf_alone(self) -> str:
        return "method.ibp_weight" if self.ibp_weight else ""

    def check(self, model: nn.Module, x: Tensor) -> None:
        if self.ibp_weight:
            interval_bounds.worst_differences(model, x, x, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        return {"delta": zero_delta(shapes)} if self.init == "previous" else {}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        options = {"init": self.init, "clip_start": self.clip_start, "ibp_weight": self.ibp_weight}
        threat, alpha = threat.scaled(scale), self.alpha * scale
        delta = fgsm(learner, batch.x, batch.y, state.get("delta"), threat=threat, alpha=alpha, **options)
        if state:
            state["delta"].copy_(delta)

    def describe(self) -> str:
        bound = f", interval bound's weight {self.ibp_weight:g}" if self.ibp_weight else ""
        return f"fgsm, {self.init} start, alpha {describe(self.alpha)}{bound}"


def zero_delta(shapes: Shapes) -> Tensor:
    """A perturbation for every place in the batch: zero at first, then what the minibatch before left there."""
    return torch.zeros(shapes.batch, device=shapes.device).contiguous(memory_format=torch.channels_last)
