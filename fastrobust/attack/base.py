"""What every attack of an evaluation offers, and how a name stands for one."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import __version__
from fastrobust.attack.threat import Threat
from fastrobust.config import parts
from fastrobust.config.sources import sources
from fastrobust.runtime.errors import ConfigError


class Setting(NamedTuple):
    """What an attack is run on. images: uint8 N x C x H x W on the model's device. alpha: the step size, for attacks that
    have one. bf16: whether the passes of its search are in bf16, if it `takes_bf16`. Two attacks with equal settings do
    the same."""

    model: nn.Module
    images: Tensor
    threat: Threat
    alpha: float
    batch_size: int
    seed: int
    bf16: bool = False


class FewSizes(nn.Module):
    """A model in eval mode whose batches have at most `most` examples, or half of them, a quarter, and so on: others are
    filled up with black images. Attacks that go on with the images that are left come with ever new numbers of them."""

    def __init__(self, model: nn.Module, most: int):
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x: Tensor) -> Tensor:
        size = self.most
        while 0 < len(x) <= size // 2:
            size //= 2
        return self.model(F.pad(x, (0,) * 7 + (max(0, size - len(x)),)))[: len(x)]


class Attack(ABC):
    """An attack runs in `rounds`, each on the images that are still robust when it begins (see `rounds.run_rounds`).

    One of one's own derives from this class and is named `package.module:Class` where an attack is asked for; numbers
    behind the name (`pgd-50-10`) come as `numbers`. `has_alpha`: whether its verdicts depend on alpha. `takes_bf16`: whether
    it still finds what it should where the passes that it makes are in bf16 (`bf16`); what it found is judged in fp32.
    `tick(share)` may be set: it hears now and then which share of a batch's work is done. `fixed`: the model sees batches of
    one size alone where that can be had, else of a few (`FewSizes`), since cuDNN prepares its kernels for every new size."""

    tick: Callable[[float], None]
    fixed: bool = False
    rounds: int = 1
    has_alpha: ClassVar[bool] = False
    takes_bf16: ClassVar[bool] = False
    bf16: bool = False

    def __init__(self, setting: Setting, numbers: tuple[int, ...] = ()):
        self.setting, self.images = setting, setting.images
        self.batch_size, self.tick = setting.batch_size, lambda share: None
        self.fixed, self.bf16 = self.fixed or setting.images.is_cuda, setting.bf16 and self.takes_bf16
        self.model = FewSizes(setting.model, setting.batch_size) if self.fixed else setting.model

    @classmethod
    def check(cls, numbers: tuple[int, ...]) -> None:
        """Raise ConfigError unless the attack takes these numbers, and can be run here."""
        if numbers:
            raise ConfigError(f"the attack takes no numbers, found {'-'.join(map(str, numbers))}")

    @classmethod  # noqa: B027 (most attacks take any model)
    def check_model(cls, model: nn.Module, images: Tensor) -> None:
        """Raise ConfigError if the attack is not defined for this model. images: as in a `Setting`."""

    @classmethod
    def work(cls, numbers: tuple[int, ...]) -> float:
        """About how many gradients an image costs, at most: for estimates of the time."""
        return 100.0

    @classmethod
    def made_by(cls) -> str:
        """Whose code it is, with its version, or the beginning of its file's SHA-256: kept with every verdict."""
        if cls.__module__.startswith("fastrobust."):
            return f"fastrobust {__version__}"
        own = sources([f"{cls.__module__}:{cls.__qualname__}"])
        return " ".join([cls.__module__, *(facts["sha256"][:12] for facts in own.values())])

    def batches(self, number: int, alive: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """(indices of images, a start) for every batch of round `number`. alive: bool N."""
        batches = alive.nonzero()[:, 0].split(self.batch_size)
        return ((index, batch) for batch, index in enumerate(batches) if len(index))

    @abstractmethod
    def run(self, x: Tensor, y: Tensor, start: Any) -> tuple[Tensor, Tensor]:
        """Which images survived (bool, N), and for those that did not a point that is misclassified, float N x C x H x W. x:
        images in [0, 1]. The model is in eval mode, and its weights ask for no gradient."""


def parse(name: str) -> tuple[type[Attack], tuple[int, ...]]:
    """The class and the numbers that `pgd-50-10` stands for, checked. Raises ConfigError."""
    word, numbers = re.fullmatch(r"(.*?)((?:-\d{1,6})*)", name, re.S).groups()
    if ":" not in word and word not in parts.ATTACKS:
        raise ConfigError(f"attack: {parts.unknown(word, (*parts.ATTACKS, *parts.ATTACK_GROUPS))}")
    kind = parts.find_class("attack", parts.ATTACKS, word)
    values = tuple(int(number) for number in numbers.split("-")[1:])
    kind.check(values)
    return kind, values
