"""Learning rates as pure functions of training time, which is counted in epochs and may be fractional; and the tables of
what they are at every weight update of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrobust.data.stream import end_of_pass
from fastrobust.schema import Config


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


def from_config(schedule, epochs: float) -> Callable[[float], float]:
    """The function epoch -> learning rate that a config's `schedule` section describes."""
    if schedule.name == "cyclic":
        return lambda epoch: cyclic(epoch, epochs, schedule.max_lr, schedule.peak)
    if schedule.name == "multistep":
        return lambda epoch: multistep(epoch, epochs, schedule.lr, schedule.milestones, schedule.factor)
    return lambda epoch: interpolate(schedule.points, epoch)


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
    schedule = from_config(config.schedule, config.epochs)
    return torch.tensor([schedule(epoch) for epoch in update_epochs(config, examples)])


def epsilon_scale_table(config: Config, examples: int) -> Tensor:
    """What epsilon and alpha are multiplied by at every weight update: 1, but for the epochs of `epsilon_warmup`."""
    warmup = config.epsilon_warmup
    return torch.tensor([min(1.0, epoch / warmup) if warmup else 1.0 for epoch in update_epochs(config, examples)])


def steps_in(config: Config, phase, examples: int) -> int:
    """The number of batches in a phase."""
    return end_of_pass(config.passes(phase) - 1, examples, phase.batch_size)
