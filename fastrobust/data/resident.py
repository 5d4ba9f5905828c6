"""A data set that lives whole in the memory of the training device, as uint8, and is shuffled there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrobust.data import stream
from fastrobust.data.sources import ImageSet


class Resident:
    """Args: images, uint8 N x C x H x W, and labels are moved to `device`. Of `world` processes this is number `rank`."""

    name = "resident"
    crops = False  # images are whole; the training step crops and mirrors them

    def __init__(self, data: ImageSet, device: torch.device, rank: int = 0, world: int = 1):
        self.images = data.images.to(device).permute(0, 2, 3, 1).contiguous()
        self.labels = data.labels.to(device)
        self.classes, self.channels = data.classes, data.images.shape[1]
        self.rank, self.world = rank, world
        self.source, self.checksum = data.source, data.checksum()

    def close(self) -> None:
        """There is nothing to close."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, seed: int, phase: int, batch_size: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `first` to `last` - 1 of a phase: (uint8 B x C x H x W in channels-last memory, int64 B). batch_size is
        that of all processes together, B = batch_size / world."""
        order = stream.Order(len(self), seed, phase, self.labels.device)
        for t in range(first, last):
            index = order.take(*stream.share(t, batch_size, self.rank, self.world))
            yield self.images.index_select(0, index).permute(0, 3, 1, 2), self.labels.index_select(0, index)
