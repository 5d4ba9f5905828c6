"""Which of a data set's images are used: all, an even part of them, those that are held out from training, or the others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastrobust.runtime.errors import DataError

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


class Choice(NamedTuple):
    """Which images of a data set are used, and how they are read: the keys of a config's `data` of the same names.
    channels: 1 makes grey images of colours."""

    limit: int | None = None
    held_out: int = 0
    seed: int = 0
    labels: str | None = None
    skip_corrupt: bool = False
    channels: int = 3

    def of(self, labels: np.ndarray, split: str) -> np.ndarray:
        """The ascending numbers of a split's images. labels: of all images of the test set, or of the training set, of
        which `limit` takes an even part after some were held out. Raises DataError."""
        numbers = np.arange(len(labels))
        if self.held_out and split != "test":
            held = held_out(labels, self.held_out, self.seed)
            numbers = held if split == "held_out" else np.setdiff1d(numbers, held)
        return numbers[evenly_spaced(len(numbers), self.limit)]


ALL = Choice()
