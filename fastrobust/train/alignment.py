"""How well the gradients at both ends of an attack agree: a sign of catastrophic overfitting that comes before it."""

from __future__ import annotations

from torch import Tensor

EVERY = 8  # updates that one is known of
WINDOW = 64  # updates that an epoch's figure is the mean of: its last ones
UNKNOWN = 2.0  # no cosine


def alignment(at_start: Tensor, at_end: Tensor) -> Tensor:
    """PertAlign (SORA, 2026): the mean over the examples of the cosine between the loss's gradients with respect to the
    input where the attack's last step begins and where it ends (shape []). Along a straight line it is 1. Examples with a
    gradient of zero, or one that is no number, are left out; UNKNOWN where none is left."""
    a, b = (t.detach().flatten(1).float() for t in (at_start, at_end))  # our kernels give half precision
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return cosine.nanmean().nan_to_num(UNKNOWN)
