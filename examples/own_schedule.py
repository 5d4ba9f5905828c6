"""A learning-rate schedule of your own: half a cosine, from `max_lr` to 0."""

import math

from fastrobust.config.fields import Positive
from fastrobust.train.schedules import Schedule


class Cosine(Schedule):
    max_lr: Positive

    def rate(self, epoch, epochs):
        return self.max_lr * (1 + math.cos(math.pi * epoch / epochs)) / 2

    def highest(self):
        return self.max_lr
