"""Standard training: no attack."""

from typing import ClassVar, Literal

from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.train.methods.base import Inputs, Learner, Method, Scale


class Standard(Method):
    splits: ClassVar[bool] = True
    attacks: ClassVar[bool] = False
    soft_labels = property(lambda self: True)
    name: Literal["standard"]

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        learner.update(batch.x, batch.y)
