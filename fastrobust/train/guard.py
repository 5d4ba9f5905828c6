"""Detectors of catastrophic overfitting, of divergence and of a collapsed loss scale: three things, three remedies.

Catastrophic overfitting is single-step training that stops making models robust, from one epoch to the next. Its detectors
look at the history of a run: per epoch, `train_accuracy` on the perturbed images that it was trained on, and
`guard_accuracy` under PGD on one training minibatch. A diverged model has weights that are not numbers. When fp16's loss
scale collapses the weights stay as they are: every update overflows and is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FREE_JUMP = 0.1  # a rise of training accuracy within an epoch that the epochs before it do not explain
GAP = 0.5  # between the accuracy under the training attack and under PGD
PATIENCE = 3  # epochs that such a gap may last without PGD accuracy rising: some runs start with one and close it


def fell(history: list[dict], drop: float) -> bool:
    """PGD accuracy is more than `drop` below the epoch before (paper, appendix B; the authors' `early_stop`)."""
    return len(history) > 1 and history[-2]["guard_accuracy"] - history[-1]["guard_accuracy"] > drop


def gapes(record: dict) -> bool:
    """The training attack is beaten, PGD is not."""
    return record["train_accuracy"] - record["guard_accuracy"] > GAP


def never_rises(history: list[dict]) -> bool:
    """The gap has lasted for PATIENCE epochs and PGD accuracy has not risen in them: the model overfits its attack, and
    may never have been robust, so that nothing can fall."""
    last = history[-PATIENCE:]
    return len(last) == PATIENCE and all(map(gapes, last)) and last[-1]["guard_accuracy"] <= last[0]["guard_accuracy"]


def jumped(history: list[dict]) -> bool:
    """Accuracy on the training attack rises by more than FREE_JUMP, and by more than twice what the epoch before gained.
    Costs nothing, and is a hint only: some healthy runs take off late."""
    if len(history) < 3:
        return False
    a, b, c = (record["train_accuracy"] for record in history[-3:])
    return c - b > FREE_JUMP and c - b > 2 * max(b - a, 0.0) and b > 0.2


def verdict(history: list[dict], drop: float) -> tuple[str, str] | None:
    """("overfit" or "suspect", why) for the last epoch of the history, or None when it looks healthy."""
    last = history[-1]
    if fell(history, drop):
        before = history[-2]["guard_accuracy"]
        return "overfit", f"PGD accuracy on a training minibatch fell from {before:.1%} to {last['guard_accuracy']:.1%}"
    if gapes(last):
        why = f"{last['train_accuracy']:.1%} under the training attack, but {last['guard_accuracy']:.1%} under PGD"
        if never_rises(history):
            return "overfit", f"{why}, and no better than {PATIENCE - 1} epochs before"
        return "suspect", why
    if jumped(history):
        before, now = history[-2]["train_accuracy"], last["train_accuracy"]
        return "suspect", f"accuracy under the training attack jumped from {before:.1%} to {now:.1%}"
    return None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of the tensors is one. Waits for the device once."""
    finite = [t.isfinite().all() for t in tensors if t.is_floating_point()]
    return bool(torch.stack(finite).all())


def trouble(learner) -> str | None:
    """What has gone wrong with the numbers of a learner since its sums were reset, and what helps; None if nothing has.
    Looks at the weights too: the loss of an update is taken before it, so that the last update of an epoch can spoil them
    unseen. fp16 skips updates that overflow and halves its loss scale at each, to find its place; below 1 it has none."""
    loss, fp16 = learner.loss_sum.item(), learner.scaler.is_enabled()
    finite = all_finite(t for name, t in learner.tensors().items() if name != "sums.loss_sum")
    if not finite or (not fp16 and not math.isfinite(loss)):
        spoilt = "weights or optimiser hold infinite numbers or NaN" if math.isfinite(loss) else f"the loss became {loss}"
        return f"training diverged: {spoilt}. Lower the learning rate (schedule) and start anew"
    if fp16 and learner.scaler.get_scale() < 1:
        return (
            f"fp16's loss scale collapsed to {learner.scaler.get_scale():g}: every update overflows and is skipped, the "
            "weights stand still. Use precision: bf16 or fp32, or lower the learning rate, and start anew"
        )
    return None
