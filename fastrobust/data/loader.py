"""What the loaders ffcv, dali and torch share: which images a batch holds, where they are cropped, and the test images.

A loader decodes, crops, resizes and (where it crops at random) mirrors on its way; it yields uint8 images on the device,
B x C x resolution x resolution in channels-last memory, and int64 labels. All loaders take the same images in the same
order and the same boxes out of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrobust.data import prefetch, stream
from fastrobust.data.sources import ImageSet


class Job(NamedTuple):
    """A batch to be made. index: the images, int64 B; random: (seed, phase, position of the first in the stream), or None
    for the squares in the middle; flip: whether half of them are mirrored."""

    index: np.ndarray
    random: tuple[int, int, int] | None
    flip: bool

    def boxes(self, heights: np.ndarray, widths: np.ndarray, k: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """int64 N x (top, left, height, width) for image k of the batch and those after it, whose sizes are given, and bool
        N whether to mirror."""
        if self.random is None:
            return stream.middle_squares(heights, widths), np.zeros(len(heights), bool)
        seed, phase, start = self.random
        boxes, flips = stream.random_crops(heights, widths, seed, phase, start + k)
        return boxes, flips & self.flip


class Jobs:
    """The jobs for batches `first` to `last` - 1 of a phase, made when asked for."""

    def __init__(self, loader: Loader, seed: int, phase: int, batch_size: int, first: int, last: int):
        self.order = stream.Order(len(loader), seed, phase)
        self.crops, self.flip, self.shard = loader.crops, loader.flip, (loader.rank, loader.world)
        self.seed, self.phase, self.batch_size, self.first, self.last = seed, phase, batch_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, k: int) -> Job:
        if not 0 <= k < len(self):
            raise IndexError(k)
        start, stop = stream.share(self.first + k, self.batch_size, *self.shard)
        return Job(self.order.take(start, stop).numpy(), (self.seed, self.phase, start) if self.crops else None, self.flip)


class Loader(ABC):
    """Args: labels int64 N; resolution of the batches; a config's `data.augment`, or None for the test images; `workers`
    threads or processes. Of `world` processes this is number `rank`. Subclasses decode."""

    name: str

    def __init__(self, labels, classes, channels, resolution, augment, device, workers, rank=0, world=1):
        self.labels, self.classes, self.channels = labels, classes, channels
        self.resolution, self.device, self.workers = resolution, device, workers
        self.crops = augment is not None and augment.crop == "random_resized"
        self.flip = self.crops and augment.flip
        self.rank, self.world = rank, world
        self.files: list[int] = []  # descriptors

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, seed: int, phase: int, batch_size: int, first: int, last: int) -> Iterator[prefetch.Batch]:
        """Batches `first` to `last` - 1 of a phase. batch_size is that of all processes together, B = batch_size / world."""
        return self.decoded(Jobs(self, seed, phase, batch_size, first, last))

    @abstractmethod
    def decoded(self, jobs) -> Iterator[prefetch.Batch]:
        """The batches of these jobs, in order."""

    def in_order(self, batch_size: int = 256) -> ImageSet:
        """All images, in order, in memory: the squares in their middles at the loader's resolution."""
        numbers = np.arange(len(self))
        jobs = [Job(numbers[k : k + batch_size], None, False) for k in range(0, len(self), batch_size)]
        images = torch.empty(len(self), self.resolution, self.resolution, self.channels, dtype=torch.uint8)
        done = 0
        for batch, _ in self.decoded(jobs):
            images[done : done + len(batch)] = batch.permute(0, 2, 3, 1)
            done += len(batch)
        return ImageSet(images.permute(0, 3, 1, 2), torch.from_numpy(self.labels), self.classes, self.name)

    def finish(self, images: Tensor, job: Job) -> prefetch.Batch:
        """(images in the model's shape, labels) from B x H x W x 3."""
        images = images.permute(0, 3, 1, 2)
        if self.channels == 1:
            images = images[:, :1].contiguous(memory_format=torch.channels_last)
        return images, torch.from_numpy(self.labels[job.index])
