"""Which of a data set's images are used: all, an even part of them, those that are held out from training, or the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastrobust.runtime.errors import DataError

SPREAD = "each class in proportion, evenly spaced"  # the rule of `spread`, as results name it
SPLITS = ("train", "test", "held_out")  # held_out: training images that are never trained on


def held_out(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The ascending numbers of `count` images, drawn at random and evenly over the classes: a pure function, the same on
    every machine. No class gives more than half of its images: where one is too small, the others give more. With a larger
    `count` the same images are held out, and more. labels: int64, N, of all training images. Raises DataError."""
    labels = np.asarray(labels, np.int64)
    draws = np.random.Philox(key=seed).random_raw(len(labels))
    order = np.lexsort((draws, labels))
    sizes = np.bincount(labels)
    place = np.empty(len(labels), np.int64)  # of each image within its class, in the order of the draws
    place[order] = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)
    free = np.flatnonzero(place < sizes[labels] // 2)
    if count > len(free):
        most = f"{len(free)} of the {len(labels)} training images can be: half of each class"
        raise DataError(f"data.held_out is {count}, but at most {most}")
    return np.sort(free[np.lexsort((draws[free], place[free]))[:count]])


def evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """Ascending indices of `limit` of `count` things, or of all of them."""
    taken = count if limit is None else min(limit, count)
    return np.arange(taken) * count // taken


def spread(labels: np.ndarray, classes: Sequence[str], limit: int | None) -> np.ndarray:
    """Ascending numbers of `limit` images: every class has its share of them, rounded up or down, evenly spaced over the
    images of the class. labels are indices into the names `classes`; the order of the names does not matter. A set that is
    sorted by class gives what `evenly_spaced` gives."""
    rank = np.argsort(np.argsort(np.asarray(classes)))
    return np.sort(np.argsort(rank[np.asarray(labels)], kind="stable")[evenly_spaced(len(labels), limit)])


class Choice(NamedTuple):
    """Which images of a data set are used, and how they are read: the keys of a config's `data` of the same names.
    channels: 1 makes grey images of colours."""

    limit: int | None = None
    held_out: int = 0
    seed: int = 0
    labels: str | None = None
    skip_corrupt: bool = False
    channels: int = 3

    def of(self, labels: np.ndarray, split: str, classes: Sequence[str]) -> np.ndarray:
        """The ascending numbers of a split's images: the one rule of all commands. labels: of all images of the test set, or
        of the training set, as indices into the names `classes`. Of the training images that are not held out `limit` takes
        an even part, whatever their class: weights of runs depend on it. Of other images every class has its share. Raises
        DataError."""
        numbers = np.arange(len(labels))
        if self.held_out and split != "test":
            held = held_out(labels, self.held_out, self.seed)
            numbers = held if split == "held_out" else np.setdiff1d(numbers, held)
        if split == "train":
            return numbers[evenly_spaced(len(numbers), self.limit)]
        return numbers[spread(np.asarray(labels)[numbers], classes, self.limit)]


ALL = Choice()
