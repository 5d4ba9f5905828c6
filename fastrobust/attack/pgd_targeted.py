"""Targeted PGD: towards the most likely wrong classes, one after the other."""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.attack import gradient
from fastrobust.attack.autoattack import TARGETS, classes_of
from fastrobust.attack.base import Attack, Setting
from fastrobust.attack.pgd import packed
from fastrobust.attack.verdicts import correct
from fastrobust.runtime.errors import ConfigError


class PgdT(Attack):
    """`pgd-t-STEPS-RESTARTS`: a round is one target of one restart. The targets are the wrong classes with the largest
    logits at the image, as many as APGD-T has (9, or all); the loss is the target's logit above the label's (MultiTargeted,
    Gowal et al., 2019), whose gradient does not fade where the softmax saturates. Any wrong class counts as a success."""

    has_alpha: ClassVar[bool] = True

    def __init__(self, setting: Setting, numbers: tuple[int, ...]):
        super().__init__(setting, numbers)
        self.steps, restarts = numbers
        self.targets = min(TARGETS, classes_of(self.model, self.images) - 1)
        self.rounds = restarts * self.targets

    @classmethod
    def check(cls, numbers: tuple[int, ...]) -> None:
        if len(numbers) != 2 or min(numbers) < 1:
            raise ConfigError("attack: pgd-t is written pgd-t-STEPS-RESTARTS, such as pgd-t-50-1")

    @classmethod
    def work(cls, numbers: tuple[int, ...]) -> float:
        return float(numbers[0] * numbers[1] * TARGETS)

    def batches(self, number: int, alive: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, int]]]:
        found = packed(self.images, alive, self.setting.threat, self.batch_size, (self.setting.seed, number))
        return ((index, (noise, number % self.targets)) for index, noise in found)

    def run(self, x: Tensor, y: Tensor, start: tuple[Tensor, int]) -> tuple[Tensor, Tensor]:
        noise, rank = start
        threat, alpha = self.setting.threat, self.setting.alpha
        with torch.no_grad():
            logits = self.model(x).float()
        wrong = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
        loss = gradient.margin_to(wrong.topk(rank + 1).indices[:, rank])
        delta, survived, found = threat.clip(noise, x), torch.ones_like(y, dtype=torch.bool), x.clone()
        for step in range(self.steps + 1):  # the last one only looks at where the one before came to
            points = x + delta
            logits, delta = gradient.step(self.model, x, y, delta, threat, alpha, loss)
            right = correct(logits, y)
            found = torch.where((survived & ~right)[:, None, None, None], points, found)
            survived = survived & right
            self.tick((step + 1) / (self.steps + 1))
        return survived, found
