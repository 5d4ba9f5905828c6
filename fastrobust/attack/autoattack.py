"""AutoAttack's four parts (Croce & Hein, 2020) as attacks, from the authors' package.

The package's own `standard` version sets every hyperparameter; batching, the choice of examples, seeds, progress and the
judgement of what was found are ours.
"""

import importlib.metadata
import logging
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastrobust.attack.base import Attack, Setting
from fastrobust.attack.verdicts import correct, evaluating
from fastrobust.config.parts import ATTACK_GROUPS
from fastrobust.data.augment import to_unit
from fastrobust.runtime.errors import ConfigError, installing

PARTS = ATTACK_GROUPS["autoattack"]
TARGETS = 9  # rival classes that the targeted parts try, most likely first
PASSES = {"apgd-ce": 102, "apgd-t": 103 * TARGETS, "fab-t": 206 * TARGETS, "square": 5001}  # forward passes, at most


def version() -> str:
    """The installed version of the package. ConfigError if there is none."""
    try:
        return f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"AutoAttack's attacks need a package: {installing('autoattack')}") from None


def classes_of(model: nn.Module, images: Tensor) -> int:
    with evaluating(model), torch.no_grad():
        return model(to_unit(images[:1])).shape[1]


class Part(Attack):
    """One part, in one round. `part` is its name."""

    part: ClassVar[str]
    targeted: ClassVar[bool] = False

    def __init__(self, setting: Setting, numbers: tuple[int, ...] = ()):
        super().__init__(setting, numbers)
        self.check_model(self.model, self.images)
        classes = classes_of(self.model, self.images)
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        self.passes = 0
        options = {"version": "standard", "seed": setting.seed, "device": None}
        whole = AutoAttack(self._forward, eps=setting.threat.radius, norm=setting.threat.norm.capitalize(), **options)
        whole.apgd.loss = "ce"
        whole.fab.targeted = True
        whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = min(TARGETS, classes - 1)
        parts = {"apgd-ce": whole.apgd, "apgd-t": whole.apgd_targeted, "fab-t": whole.fab, "square": whole.square}
        self.attack = parts[self.part]

    @classmethod
    def check(cls, numbers: tuple[int, ...]) -> None:
        super().check(numbers)
        version()

    @classmethod
    def check_model(cls, model: nn.Module, images: Tensor) -> None:
        if cls.targeted and (classes := classes_of(model, images)) < 4:
            raise ConfigError(
                f"{cls.part} needs at least 4 classes, the model has {classes}: --attack pgd-50-10,apgd-ce,square"
            )

    @classmethod
    def work(cls, numbers: tuple[int, ...]) -> float:
        return PASSES[cls.part] / (1 if cls.part != "square" else 3)  # which takes no gradients

    @classmethod
    def made_by(cls) -> str:
        return version()

    def _forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.tick(min(1.0, self.passes / PASSES[self.part]))
        return self.model(x).float()

    def run(self, x: Tensor, y: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Which examples survived (bool, N), and the points that the attack came to."""
        self.passes, self.attack.device = 0, x.device
        self.attack.seed = (self.setting.seed + 1009 * start) % 2**31
        x = x.contiguous()
        devices = [x.device] if x.device.type == "cuda" else []
        # APGD's best points would keep the points of all iterations alive: gradients only where the package asks for them
        with torch.random.fork_rng(devices), torch.no_grad():
            points = self.attack.perturb(x.clone(), y.clone())
            return correct(self.model(points), y), points


class ApgdCe(Part):
    part: ClassVar[str] = "apgd-ce"


class ApgdT(Part):
    part: ClassVar[str] = "apgd-t"
    targeted: ClassVar[bool] = True


class FabT(Part):
    part: ClassVar[str] = "fab-t"
    targeted: ClassVar[bool] = True


class Square(Part):
    part: ClassVar[str] = "square"
