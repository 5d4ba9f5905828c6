"""Learning rates as pure functions of training time. Time is counted in epochs, and may be fractional."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence


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
