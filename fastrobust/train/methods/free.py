"""Free adversarial training (Shafahi et al., 2019)."""

from typing import ClassVar, Literal

from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import Count, key
from fastrobust.train.methods.base import Inputs, Learner, Method, Scale, Shapes
from fastrobust.train.methods.fgsm import zero_delta


def free(learner: Learner, x: Tensor, y: Tensor, delta: Tensor, *, threat: Threat, replays: int) -> Tensor:
    """Free adversarial training (paper, Algorithm 2): every replay of the minibatch updates the weights, and the same
    backward pass moves delta, by epsilon. delta is kept between minibatches; what it is in the end is returned."""
    for _ in range(replays):
        delta = threat.clip(delta, x)
        gradient = learner.update_with_input_gradient(threat.point(x, delta), y)
        delta = threat.climb(delta, gradient, threat.radius, x)
    return delta


class Free(Method):
    by_slot: ClassVar[tuple[str, ...]] = ("delta",)
    soft_labels = property(lambda self: True)
    name: Literal["free"]
    replays: Count = key("updates for each minibatch (m in the paper)", 8)

    @property
    def updates_per_batch(self) -> int:
        return self.replays

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        return {"delta": zero_delta(shapes)}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        threat = threat.scaled(scale)
        state["delta"].copy_(free(learner, batch.x, batch.y, state["delta"], threat=threat, replays=self.replays))

    def describe(self) -> str:
        return f"free, {self.replays} replays"
