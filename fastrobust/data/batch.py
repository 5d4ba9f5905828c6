"""What a loader yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """images: uint8 N x C x H x W in channels-last memory. labels: int64 N. index: the images' numbers in the data set,
    int64 N; do not write into it, for it may be a view of the order of the pass. All are on the training device, and of one
    shape within a phase."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def first(self, count: int) -> Batch:
        return Batch(*(t[:count] for t in self))
