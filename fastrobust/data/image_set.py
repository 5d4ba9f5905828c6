"""Labelled images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastrobust.data.held_out import SPREAD
from fastrobust.runtime.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    images: uint8, N x C x H x W, stored as N, H, W, C and permuted (channels-last memory).
    labels: int64, N; each is an index into `classes`.
    classes: class names in label order.
    source: the file(s) or folder that the images came from, for records.
    numbers: int64, N, of each image in the whole split; None where these are all of it.
    names: the images' files, where each has its own. skipped: what was left out as `data.skip_corrupt` says, and why.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str
    names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    numbers: torch.Tensor | None = None

    def labelled_as(self, classes: tuple[str, ...], whose: str) -> ImageSet:
        """The same images with labels that are indices into `classes`, matched by name. A note names the classes that this
        set does not have. Raises DataError if this set has a class that is not in `classes`."""
        if self.classes == classes:
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise DataError(
                f"{self.source} has images of {listed(unknown)}, but {whose} has {listed(classes)}: "
                "give images of the same classes, under the same names"
            )
        places = torch.tensor([classes.index(name) for name in self.classes])
        absent = [name for name in classes if name not in self.classes]
        if absent:
            print(
                f"note: {self.source} has no images of {listed(absent)}: accuracies are over the other classes", flush=True
            )
        return replace(self, labels=places[self.labels], classes=classes)

    def take(self, numbers: Sequence[int]) -> ImageSet:
        """The images with these numbers, in this order."""
        index = torch.as_tensor(numbers, dtype=torch.int64)
        names = tuple(self.names[i] for i in index.tolist()) if self.names else ()
        among = index if self.numbers is None else self.numbers[index]
        return replace(self, images=self.images[index], labels=self.labels[index], names=names, numbers=among)

    @property
    def chosen(self) -> str:
        """By which rule these images were chosen of their split, for records. Older records do not have it: of a limited
        number of test images they hold those that `evenly_spaced` gives, whatever their class."""
        return "all" if self.numbers is None else SPREAD

    def checksum(self) -> str:
        """SHA-256 of the pixels as stored, the labels and the names of the classes: what a result says it is about."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.labels.numpy())
        for image in self.images.permute(0, 2, 3, 1).split(1024):
            digest.update(np.ascontiguousarray(image.numpy()))
        return digest.hexdigest()


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many there are."""
    shown = ", ".join(map(str, names[:most]))
    return f"{len(names)} classes ({shown}{', ...' if len(names) > most else ''})" if len(names) > 1 else f"class {shown}"
