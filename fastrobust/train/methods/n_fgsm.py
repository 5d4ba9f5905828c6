"""N-FGSM (de Jorge et al., 2022, "Make Some Noise"): FGSM with stronger noise and without clipping to the ball."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fastrobust.attack.threat import Radius, Threat
from fastrobust.config.fields import Pixels, Positive, key
from fastrobust.config.numbers import describe
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale


def n_fgsm(learner: Learner, x: Tensor, y: Tensor, *, noise: Threat, alpha: Radius) -> None:
    """N-FGSM (de Jorge et al., 2022, Algorithm 1): a start in the larger ball `noise`, a step of alpha = epsilon, and no
    clipping but to the pixel box."""
    delta = noise.start(x)
    gradient, _ = learner.attack_gradient(noise.point(x, delta), y)
    delta = noise.climb(delta, gradient, alpha, x, project=False)
    learner.update(noise.point(x, delta), y)


Noise = Annotated[
    Positive, Field(title="a factor above 0", description="the start is uniform in a ball of `noise` × epsilon")
]


class NFgsm(Attacked):
    splits: ClassVar[bool] = True
    soft_labels = property(lambda self: True)
    name: Literal["n_fgsm"]
    noise: Noise = 2.0
    alpha: Pixels | None = key("step size", None, "epsilon")

    def resolve(self, epsilon: float) -> None:
        self.alpha = epsilon if self.alpha is None else self.alpha

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        noise = threat.scaled(self.noise).scaled(scale)
        n_fgsm(learner, batch.x, batch.y, noise=noise, alpha=self.alpha * scale)

    def describe(self) -> str:
        return f"n_fgsm, noise {self.noise:g} epsilon, alpha {describe(self.alpha)}"
