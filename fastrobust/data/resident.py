"""A data set that lives whole in the memory of the training device, as uint8, and is shuffled there.

Batches all have one shape. The passes over the data form one endless stream, pass after pass, each a fresh permutation,
and batch t is its positions t B to (t + 1) B. So the odd images at the end of a pass are neither dropped nor trained on
in a smaller batch: they open the first batch of the next pass. After the last pass of a phase the last batch is filled
up from one permutation more. A permutation depends on (seed, phase, pass) alone: any batch can be had at any time, which
is what resuming needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastrobust.data.sources import ImageSet


def permutation(n: int, seed: int, phase: int, pass_: int) -> Tensor:
    """The order of the n examples in one pass. int64, on the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + phase * 100_003 + pass_)
    return torch.randperm(n, generator=generator)


def end_of_pass(pass_: int, n: int, batch_size: int) -> int:
    """The number of batches after which every example of passes 0 to `pass_` has been seen."""
    return math.ceil((pass_ + 1) * n / batch_size)


class Resident:
    """Args: images, uint8 N x C x H x W, and labels are moved to `device`."""

    def __init__(self, data: ImageSet, device: torch.device):
        self.images = data.images.to(device).permute(0, 2, 3, 1).contiguous()
        self.labels = data.labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, seed: int, phase: int, batch_size: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `first` to `last` - 1 of a phase: (uint8 B x C x H x W in channels-last memory, int64 B)."""
        n = len(self)
        current, order = -1, torch.empty(0)
        for t in range(first, last):
            parts, position = [], t * batch_size
            while position < (t + 1) * batch_size:
                if position // n != current:
                    current = position // n
                    order = permutation(n, seed, phase, current).to(self.labels.device, non_blocking=True)
                stop = min((t + 1) * batch_size, (current + 1) * n)
                parts.append(order[position - current * n : stop - current * n])
                position = stop
            index = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield self.images.index_select(0, index).permute(0, 3, 1, 2), self.labels.index_select(0, index)
