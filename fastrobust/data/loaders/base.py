"""What the loaders ffcv, dali and torch share: which images a batch holds, where they are cropped, and the test images.

A loader decodes, crops, resizes and (where it crops at random) mirrors on its way; it yields a `Batch` of uint8 images,
B x C x resolution x resolution. All loaders take the same images in the same order and the same boxes out of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrobust.config.schema import Config
from fastrobust.config.sections import Augment, Phase
from fastrobust.data import loaders, order, sets
from fastrobust.data.batch import Batch
from fastrobust.data.prepared.records import Records, Size
from fastrobust.data.sets import ImageSet, Pictures
from fastrobust.runtime import distributed, limits
from fastrobust.runtime.distributed import ALONE, World


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
            return order.middle_squares(heights, widths), np.zeros(len(heights), bool)
        seed, phase, start = self.random
        boxes, flips = order.random_crops(heights, widths, seed, phase, start + k)
        return boxes, flips & self.flip


class Jobs:
    """The jobs for batches `first` to `last` - 1 of a phase, made when asked for."""

    def __init__(self, loader: Loader, seed: int, phase: int, batch_size: int, first: int, last: int):
        labels = torch.from_numpy(loader.labels) if loader.balanced else None
        self.order = order.Order(len(loader), seed, phase, labels=labels)
        self.crops, self.flip, self.shard = loader.crops, loader.flip, (loader.rank, loader.world)
        self.seed, self.phase, self.batch_size, self.first, self.last = seed, phase, batch_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, k: int) -> Job:
        if not 0 <= k < len(self):
            raise IndexError(k)
        start, stop = order.share(self.first + k, self.batch_size, *self.shard)
        return Job(self.order.take(start, stop).numpy(), (self.seed, self.phase, start) if self.crops else None, self.flip)


class Loader(ABC):
    """Args: data, the images: prepared ones (`Records`) or the source's (`Pictures`); size, to which the short side of each
    is shrunk before it is cropped; the channels and the resolution of the batches; a config's `data.augment`, or None for
    the test images; `workers` threads or processes. Of `world` processes this is number `rank`. Subclasses decode.

    A loader of one's own derives from this class and is named `loader: package.module:Class` in a config."""

    balanced = False  # `data.balance`

    def __init__(
        self,
        data: Records | Pictures,
        size: Size,
        channels: int,
        resolution: int,
        augment: Augment | None,
        device: torch.device,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.data, self.size, self.labels, self.classes = data, size, data.labels, data.classes
        self.channels, self.resolution, self.device, self.workers = channels, resolution, device, workers
        self.crops = augment is not None and augment.crop == "random_resized"
        self.flip = self.crops and augment.flip
        self.rank, self.world = rank, world
        self.source, self.checksum = data.source, data.checksum()
        self.files = data.open() if isinstance(data, Records) else []  # descriptors
        members = data.members if isinstance(data, Pictures) else None
        self.names = tuple(member.name for member in members or ())
        self.skipped: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, config: Config, split: str, size: Size, resolution: int, device: torch.device, world: World = ALONE
    ) -> Loader:
        """The loader of a split for a resolved config. Raises ConfigError or DataError."""
        workers = config.data.workers or max(1, limits.cores() // distributed.on_this_machine(world.size))
        augment = config.data.augment if split == "train" else None
        data = cls.find(config, split, size, resolution)
        return cls(data, size, config.facts.channels or 3, resolution, augment, device, workers, world.rank, world.size)

    @classmethod
    def find(cls, config: Config, split: str, size: Size, resolution: int) -> Records | Pictures:
        """The images that the loader reads: prepared ones where the config names them, else the source's."""
        kind, data = loaders.kind_of_files(config), config.data
        if kind is not None:
            return loaders.read_records(config, kind, split, size, data.limit)
        if data.download:
            sets.load(data.dataset, split, data.path, download=True, limit=1, resolution=resolution)
        return sets.pictures(data.dataset, split, data.path, choice=loaders.choice_of(config, data.limit))

    @staticmethod
    def key(phase: Phase) -> tuple:
        """Phases of one key share a loader."""
        return phase.resize, phase.resolution

    def leave_out(self, bad: dict[int, str]) -> None:
        """Go on without the images that have these numbers, for these reasons. The others are numbered anew."""
        self.data = self.data.without(bad)
        self.labels, self.checksum, self.skipped = self.data.labels, self.data.checksum(), tuple(bad.values())
        self.names = tuple(member.name for member in self.data.members)

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, seed: int, phase: int, batch_size: int, first: int, last: int) -> Iterator[Batch]:
        """Batches `first` to `last` - 1 of a phase. batch_size is that of all processes together, B = batch_size / world."""
        return self.decoded(Jobs(self, seed, phase, batch_size, first, last))

    @abstractmethod
    def decoded(self, jobs) -> Iterator[Batch]:
        """The batches of these jobs, in order."""

    def still(self, numbers: np.ndarray, batch_size: int = 256) -> Batch:
        """The images with these numbers, on the CPU: the squares in their middles at the loader's resolution."""
        jobs = [Job(numbers[k : k + batch_size], None, False) for k in range(0, len(numbers), batch_size)]
        images = torch.empty(len(numbers), self.resolution, self.resolution, self.channels, dtype=torch.uint8)
        done = 0
        for batch in self.decoded(jobs):
            images[done : done + len(batch.labels)] = batch.images.permute(0, 2, 3, 1)
            done += len(batch.labels)
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(self.labels[numbers]), torch.from_numpy(numbers))

    def in_order(self) -> ImageSet:
        """All images, in order, in memory, as `still` gives them."""
        images, labels, _ = self.still(np.arange(len(self)))
        return ImageSet(images, labels, self.classes, self.source)

    def finish(self, images: Tensor, job: Job) -> Batch:
        """The batch from decoded images, B x H x W x 3; labels and index are on the CPU."""
        images = images.permute(0, 3, 1, 2)
        if self.channels == 1:
            images = luma(images).contiguous(memory_format=torch.channels_last)
        return self.labelled(images, job)

    def labelled(self, images: Tensor, job: Job) -> Batch:
        """The batch of images, B x C x H x W, with their labels and numbers."""
        return Batch(images, torch.from_numpy(self.labels[job.index]), torch.from_numpy(job.index))


def luma(images: Tensor) -> Tensor:
    """Grey images of colours, as Pillow makes them (ITU-R 601-2); grey stays as it is. uint8, N x 3 x H x W; gives N x 1 x
    H x W."""
    red, green, blue = (images[:, i : i + 1].int() for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)
