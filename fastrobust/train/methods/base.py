"""What every training method offers: a section of a config, its state, and one training step."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import Section
from fastrobust.train.learner import Loss

Scale = float | Tensor  # where the warm-up of epsilon stands, from 0 to 1


class Learner(Protocol):
    """What a method may ask of the model that is being trained (`fastrobust.train.learner.Learner`)."""

    model: nn.Module
    epochs: int  # of the whole run

    def forward(self, x: Tensor) -> Tensor: ...

    def input_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...

    def attack_gradient(
        self,
        x: Tensor,
        y: Tensor,
        loss: Loss | None = None,
        *,
        keep: bool = False,
        twice: bool = False,
        mode: str | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def attack_logits(self, x: Tensor) -> Tensor: ...

    def update(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> None: ...

    def update_with_input_gradient(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor: ...

    def loss(self, logits: Tensor, y: Tensor) -> Tensor: ...

    def mean(self, t: Tensor) -> Tensor: ...

    def gather(self, t: Tensor) -> Tensor: ...

    def epoch(self) -> Tensor: ...


class Inputs(NamedTuple):
    """What a step is made of. x: images in [0, 1], float N x C x H x W, cropped and mirrored; y: labels, int64 N, or with
    `mixup` and `cutmix` float N x classes; index: the images' numbers in the data set, int64 N. All on the training device,
    and of one shape within a phase."""

    x: Tensor
    y: Tensor
    index: Tensor


class Shapes(NamedTuple):
    """What a method's state may depend on: the shape of x, the number of classes and of training images, the device, and
    the run's seed, from which all processes draw alike."""

    batch: tuple[int, int, int, int]
    classes: int
    examples: int
    device: torch.device
    seed: int = 0


class Method(Section, ABC):
    """The base of all methods. A method of one's own derives from it, in a module that the config names
    (`method: {name: package.module:Class}`), and its fields are the keys of the config's `method` section.

    `attacks`: whether it trains on adversarial examples, so that the guard has something to watch. `one_step`: whether
    `n_fgsm` can take its place after catastrophic overfitting (`guard.action: recover`). `by_slot`: the tensors
    of the state whose first dimension is the place in the batch; of several processes each keeps its own part. `agreed`:
    the tensors of the state that are the same in all processes after every step. `splits`: whether a step on a batch is one
    update, by the mean of what steps on its parts would come to (`phases.N.accumulate`)."""

    attacks: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    by_slot: ClassVar[tuple[str, ...]] = ()
    agreed: ClassVar[tuple[str, ...]] = ()
    name: str

    @property
    def updates_per_batch(self) -> int:
        return 1

    @property
    def batchnorm_in_attack(self) -> Literal["train", "eval"]:
        return "train"

    @property
    def soft_labels(self) -> bool:
        """Whether a step takes labels that are shares of the classes (`data.augment.mixup`)."""
        return False

    @property
    def linf_alone(self) -> str:
        """What of it is defined in L-infinity alone, such as `method.ibp_weight`; empty if nothing is."""
        return ""

    @property
    def reads_weights(self) -> bool:
        """Whether a step reads the model's weights itself, so that it needs them in fp32."""
        return False

    def resolve(self, epsilon: float) -> None:
        """Fill in the defaults that depend on epsilon."""

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Raise ConfigError if the method cannot train this model on images of the form of x."""

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        """The tensors that the method keeps between steps, by name, as they are at the start of a phase."""
        return {}

    @abstractmethod
    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        """One training step. `threat` has the config's epsilon; what depends on epsilon is multiplied by `scale`. The state
        is written in place."""

    def describe(self) -> str:
        """The method and its hyperparameters in a few words, for a report."""
        keys = ", ".join(f"{key} {value}" for key, value in self.model_dump(exclude={"name"}).items())
        return f"{self.name}, {keys}" if keys else self.name


BatchNorm = Annotated[
    Literal["train", "eval"],
    Field(
        description="BatchNorm in the attack pass. `train` (the authors' code): batch statistics, and the running averages "
        "move. `eval`: running averages, which stay as they are"
    ),
]


class Attacked(Method):
    one_step: ClassVar[bool] = True
    attack_batchnorm: BatchNorm = "train"

    @property
    def batchnorm_in_attack(self) -> Literal["train", "eval"]:
        return self.attack_batchnorm


def start(x: Tensor, previous: Tensor | None, threat: Threat, init: str, clip: bool = True) -> Tensor:
    """The start of an attack: zeros, uniform in the ball, or the last minibatch's delta; cut with the pixel box, but for
    random starts without `clip` (paper, section 4.1)."""
    if init == "zero":
        return torch.zeros_like(x)
    if init == "previous":
        return threat.clip(previous, x)
    return threat.start(x, clip)


def smoothed(amount: float) -> Loss:
    """Cross-entropy with label smoothing: the label has 1 - amount, and all classes share amount."""
    return lambda logits, y: F.cross_entropy(logits, y, label_smoothing=amount)


def signs(shapes: Shapes, rows: int = 1) -> Tensor:
    """rows x C x H x W of 1 and -1, at random, the same in all processes."""
    generator = torch.Generator().manual_seed(shapes.seed)
    return (torch.randint(2, (rows, *shapes.batch[1:]), generator=generator) * 2.0 - 1).to(shapes.device)


def per_pixel(gradient: Tensor, learner: Learner) -> Tensor:
    """A batch's gradient over its mean size, ||g||_1 by the number of pixels. It is 0 where an fp16 gradient overflowed."""
    return (gradient / learner.mean(gradient.abs().mean())).nan_to_num(0.0, 0.0, 0.0)
