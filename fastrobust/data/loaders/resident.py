"""A data set that lives whole in the memory of the training device, as uint8, and is shuffled there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastrobust.config.schema import Config
from fastrobust.config.sections import Phase
from fastrobust.data import loaders
from fastrobust.data.batch import Batch
from fastrobust.data.order import Order, share
from fastrobust.data.prepared.records import Size
from fastrobust.data.sets import ImageSet
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.errors import ConfigError


class Resident:
    """Args: images, uint8 N x C x H x W, and labels are moved to `device`. Of `world` processes this is number `rank`."""

    crops = False  # images are whole; the training step crops and mirrors them
    balanced = False  # `data.balance`

    def __init__(self, data: ImageSet, device: torch.device, rank: int = 0, world: int = 1):
        self.images = data.images.to(device).permute(0, 2, 3, 1).contiguous()
        self.labels = data.labels.to(device)
        self.classes, self.channels = data.classes, data.images.shape[1]
        self.rank, self.world = rank, world
        self.source, self.checksum = data.source, data.checksum()
        self.names, self.skipped = data.names, data.skipped

    @classmethod
    def open(
        cls, config: Config, split: str, size: Size, resolution: int, device: torch.device, world: World = ALONE
    ) -> Resident:
        if any(phase.resize == "original" for phase in config.phases):
            raise ConfigError(
                "loader: resident holds squares of one size: set phases.N.resize to a number, or another loader"
            )
        return cls(loaders.load(config, split, size, config.data.limit), device, world.rank, world.size)

    @staticmethod
    def key(phase: Phase) -> tuple:
        """Phases of one key share a loader: what is held depends on the stored size alone."""
        return (phase.resize,)

    def close(self) -> None:
        """There is nothing to close."""

    def __len__(self) -> int:
        return len(self.labels)

    def still(self, numbers: np.ndarray) -> Batch:
        """The images with these numbers, whole."""
        index = torch.from_numpy(numbers).to(self.labels.device)
        return Batch(self.images.index_select(0, index).permute(0, 3, 1, 2), self.labels.index_select(0, index), index)

    def batches(self, seed: int, phase: int, batch_size: int, first: int, last: int) -> Iterator[Batch]:
        """Batches `first` to `last` - 1 of a phase. batch_size is that of all processes together, B = batch_size / world."""
        order = Order(len(self), seed, phase, self.labels.device, self.labels if self.balanced else None)
        for t in range(first, last):
            index = order.take(*share(t, batch_size, self.rank, self.world))
            images = self.images.index_select(0, index).permute(0, 3, 1, 2)
            yield Batch(images, self.labels.index_select(0, index), index)
