"""Learning rates as pure functions of training time, which is counted in epochs and may be fractional; and the tables of
what they are at every weight update of a run."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from fastrobust.config.fields import NonNegative, Number, Positive, Section, key, some
from fastrobust.config.schema import Config
from fastrobust.data.order import end_of_pass

SHARE = "a share of training"


def interpolate(points: Sequence[tuple[float, float]], epoch: float) -> float:
    """Piecewise-linear through (epoch, learning rate) points; constant before the first and after the last. Where two
    points share an epoch the rate jumps, and the later one holds from there on."""
    if epoch < points[0][0]:
        return points[0][1]
    for (e0, lr0), (e1, lr1) in itertools.pairwise(points):
        if e0 <= epoch < e1:
            return lr0 + (lr1 - lr0) * (epoch - e0) / (e1 - e0)
    return points[-1][1]


def cyclic(epoch: float, epochs: float, max_lr: float, peak: float = 0.4) -> float:
    """0 -> max_lr at `peak` x epochs -> 0 (paper, section 5.2 and Figure 1). Only the learning rate cycles: the momentum
    stays as it is."""
    return interpolate([(0.0, 0.0), (peak * epochs, max_lr), (epochs, 0.0)], epoch)


def multistep(epoch: float, epochs: float, lr: float, milestones: Sequence[float], factor: float = 0.1) -> float:
    """lr, times `factor` for every milestone (a fraction of training) that has been reached."""
    return lr * math.prod(factor for m in milestones if epoch >= m * epochs)


class Schedule(Section, ABC):
    """The base of all schedules: a section of a config that gives the learning rate at every time of the training. One of
    one's own derives from it and is named `package.module:Class` in a config."""

    name: str

    @abstractmethod
    def rate(self, epoch: float, epochs: float) -> float:
        """The learning rate at `epoch` (fractional) of `epochs`."""

    @abstractmethod
    def highest(self) -> float:
        """The highest rate of all."""

    def check(self, epochs: int) -> None:
        """Raise ValueError if the schedule is not one for so many epochs."""


class Cyclic(Schedule):
    """0 -> max_lr at `peak` (a fraction of training) -> 0, linear in between (paper, section 5.2: 2/5)."""

    max_lr: Positive = key("the peak: linear from 0 to the peak and back to 0")
    peak: Number = key("when the peak is reached", 0.4, values=f"between 0 and 1, {SHARE}", gt=0, lt=1)

    def rate(self, epoch: float, epochs: float) -> float:
        return cyclic(epoch, epochs, self.max_lr, self.peak)

    def highest(self) -> float:
        return self.max_lr


class Multistep(Schedule):
    """`lr`, multiplied by `factor` at each milestone (fractions of training)."""

    lr: Positive = key("the first rate")
    milestones: tuple[Annotated[Number, Field(gt=0, lt=1)], ...] = key(
        "when the rate is multiplied by `factor`", (0.5, 0.75), values="shares of training, between 0 and 1"
    )
    factor: Positive = key("the multiplier", 0.1)

    def rate(self, epoch: float, epochs: float) -> float:
        return multistep(epoch, epochs, self.lr, self.milestones, self.factor)

    def highest(self) -> float:
        return self.lr


class Cosine(Schedule):
    """Linear from 0 to max_lr during `warmup` (a fraction of training), then down to 0 along half a cosine (Loshchilov &
    Hutter, 2017)."""

    max_lr: Positive = key("the highest rate")
    warmup: Number = key(
        "linear from 0 for so long; then half a cosine down to 0", 0.0, values=f"0 to below 1, {SHARE}", ge=0, lt=1
    )

    def rate(self, epoch: float, epochs: float) -> float:
        begin = self.warmup * epochs
        if epoch < begin:
            return self.max_lr * epoch / begin
        return half_cosine(self.max_lr, 0.0, (epoch - begin) / (epochs - begin))

    def highest(self) -> float:
        return self.max_lr


class OneCycle(Schedule):
    """max_lr / div -> max_lr at `peak` (a fraction of training) -> max_lr / div / final_div, along half cosines (Smith &
    Topin, 2018). The momentum stays as it is."""

    max_lr: Positive = key("the highest rate")
    peak: Number = key(
        "when the rate is highest; half cosines before and after", 0.3, values=f"between 0 and 1, {SHARE}", gt=0, lt=1
    )
    div: Number = key("the first rate is `max_lr / div`", 25.0, ge=1)
    final_div: Number = key("the last rate is the first divided by this", 1e4, ge=1)

    def rate(self, epoch: float, epochs: float) -> float:
        first, middle = self.max_lr / self.div, self.peak * epochs
        if epoch < middle:
            return half_cosine(first, self.max_lr, epoch / middle)
        return half_cosine(self.max_lr, first / self.final_div, (epoch - middle) / (epochs - middle))

    def highest(self) -> float:
        return self.max_lr


def half_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


class Points(Schedule):
    """Linear interpolation between (epoch, learning rate) pairs."""

    points: Annotated[tuple[tuple[NonNegative, NonNegative], ...], AfterValidator(some)] = key(
        "linear between the points. They must reach the last epoch", values="list of [epoch, rate]"
    )

    @model_validator(mode="after")
    def _sorted(self):
        epochs = [epoch for epoch, _ in self.points]
        if epochs != sorted(epochs):
            raise ValueError("the epochs of the points must not decrease")
        return self

    def rate(self, epoch: float, epochs: float) -> float:
        return interpolate(self.points, epoch)

    def highest(self) -> float:
        return max(rate for _, rate in self.points)

    def check(self, epochs: int) -> None:
        last = self.points[-1][0]
        if last < epochs:
            raise ValueError(f"schedule.points end at epoch {last:g}, but the phases last {epochs} epochs")


def update_epochs(config: Config, examples: int) -> list[float]:
    """When every weight update of a run takes place, in epochs. An update stands for its middle in time, so that neither
    the first nor the last of a schedule from 0 to 0 is wasted."""
    times, begun = [], 0
    for phase in config.phases:
        updates = steps_in(config, phase, examples) * config.replays
        times += [begun + (u + 0.5) / updates * phase.epochs for u in range(updates)]
        begun += phase.epochs
    return times


def lr_table(config: Config, examples: int) -> Tensor:
    """The learning rate of every weight update of a run."""
    return torch.tensor([config.schedule.rate(epoch, config.epochs) for epoch in update_epochs(config, examples)])


def epsilon_scale_table(config: Config, examples: int) -> Tensor:
    """What epsilon and alpha are multiplied by at every weight update: 1, but for the epochs of `epsilon_warmup`."""
    warmup = config.epsilon_warmup
    return torch.tensor([min(1.0, epoch / warmup) if warmup else 1.0 for epoch in update_epochs(config, examples)])


def starts(config: Config, examples: int) -> list[int]:
    """Where the batch of every weight update begins, in images since the first pass over the data."""
    found, passes = [], 0
    for phase in config.phases:
        steps = range(steps_in(config, phase, examples))
        found += [passes * examples + step * phase.batch_size for step in steps for _ in range(config.replays)]
        passes += config.passes(phase)
    return found


def steps_in(config: Config, phase, examples: int) -> int:
    """The number of batches in a phase."""
    return end_of_pass(config.passes(phase) - 1, examples, phase.batch_size)
