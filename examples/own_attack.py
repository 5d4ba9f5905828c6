"""An attack of your own for the evaluation: random corners of the ball, without any gradient."""

import torch

from fastrobust.attack.base import Attack
from fastrobust.runtime.errors import ConfigError


class Corners(Attack):
    """`own_attack:Corners-20` tries 20 corners for every image."""

    def __init__(self, setting, numbers):
        super().__init__(setting, numbers)
        (self.tries,) = numbers

    @classmethod
    def check(cls, numbers):
        if len(numbers) != 1:
            raise ConfigError("attack: Corners is written Corners-TRIES, such as Corners-20")

    def run(self, x, y, start):
        threat = self.setting.threat
        generator = torch.Generator(x.device).manual_seed(1_000_003 * self.setting.seed + start)
        survived, found = torch.ones_like(y, dtype=torch.bool), x.clone()
        for _ in range(self.tries):
            corner = threat.radius * threat.noise(x.shape, generator).sign()
            points = x + threat.clip(corner, x)
            with torch.no_grad():
                broken = survived & (self.model(points).argmax(1) != y)
            found[broken] = points[broken]
            survived &= ~broken
        return survived, found
