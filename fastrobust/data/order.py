"""Which images make up a batch and where each is cropped: pure functions of (seed, phase, place in the stream).

The passes over the data form one endless stream, pass after pass, each a fresh permutation, and batch t is its positions
t B to (t + 1) B. So the odd images at the end of a pass are neither dropped nor trained on in a smaller batch: they open
the first batch of the next pass. After the last pass of a phase the last batch is filled up from one permutation more.
Any batch can be had at any time, which is what resuming needs, and of `world` processes number `rank` takes the rank-th
part of every batch: together they see what one process would have seen.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's RandomResizedCrop
FLIP = 2 * TRIES + 2  # the number among an image's DRAWS that decides whether it is mirrored
DRAWS = 24  # random numbers an image may use: 2 for each try, 2 for the place, 1 for the flip; a multiple of Philox's 4


def permutation(n: int, seed: int, phase: int, pass_: int) -> Tensor:
    """The order of the n examples in one pass. int64, on the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + phase * 100_003 + pass_)
    return torch.randperm(n, generator=generator)


def balanced(labels: Tensor, seed: int, phase: int, pass_: int) -> Tensor:
    """The order of one pass in which every class that has images comes equally often, to within one, and every image of a
    class as often as the others, over all passes. So images of small classes come several times in a pass, and those of
    large ones not in every pass. labels: int64 N; as many numbers are given. int64, on the CPU."""
    groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    place = pass_ * len(labels) + torch.arange(len(labels))  # classes take turns in the stream of all passes
    found = torch.empty_like(labels)
    for k, group in enumerate(groups):
        mine = place % len(groups) == k
        draw = place[mine] // len(groups)  # each image of the class once, in random order, then again in another order
        rounds = draw // len(group)
        for number in rounds.unique().tolist():
            shuffled = group[permutation(len(group), seed * 1009 + k + 1, phase, number)]
            found[mine.nonzero()[:, 0][rounds == number]] = shuffled[draw[rounds == number] % len(group)]
    return found[permutation(len(labels), seed, phase, pass_)]


def end_of_pass(pass_: int, n: int, batch_size: int) -> int:
    """The number of batches after which every example of passes 0 to `pass_` has been seen."""
    return math.ceil((pass_ + 1) * n / batch_size)


class Order:
    """The stream of a phase. Keeps the order of the pass that was asked for last, on `device`. labels (int64 n): for passes
    that are `balanced`."""

    def __init__(self, n: int, seed: int, phase: int, device: torch.device | str = "cpu", labels: Tensor | None = None):
        self.n, self.seed, self.phase, self.device = n, seed, phase, device
        self.labels = None if labels is None else labels.cpu()
        self.current, self.order = -1, torch.empty(0)

    def take(self, start: int, stop: int) -> Tensor:
        """The examples at positions `start` to `stop` - 1. int64."""
        parts, position = [], start
        while position < stop:
            if position // self.n != self.current:
                self.current = position // self.n
                of_pass = self.seed, self.phase, self.current
                order = permutation(self.n, *of_pass) if self.labels is None else balanced(self.labels, *of_pass)
                self.order = order.to(self.device, non_blocking=True)
            first = self.current * self.n
            end = min(stop, first + self.n)
            parts.append(self.order[position - first : end - first])
            position = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def share(t: int, batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """The positions (start, stop) of batch t that process `rank` of `world` takes; batch_size is that of all together."""
    mine = batch_size // world
    start = t * batch_size + rank * mine
    return start, start + mine


def random_crops(
    heights: np.ndarray, widths: np.ndarray, seed: int, phase: int, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """For images of these sizes at positions `start`, `start` + 1, … of the stream: boxes, int64 N x (top, left, height,
    width), and whether to mirror, bool N."""
    bits = np.random.Philox(key=[seed, phase], counter=start * DRAWS // 4)
    draws = np.random.Generator(bits).random((len(heights), DRAWS))
    return crop_boxes(draws, heights, widths), draws[:, FLIP] < 0.5


def crop_boxes(draws: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """torchvision's RandomResizedCrop as a function of N x DRAWS random numbers: up to 10 draws of an area of 8 to 100 %
    and an aspect ratio of 3/4 to 4/3, the first that fits, else the middle at the nearest ratio. `augment.boxes` is the
    same rule on a GPU. int64 N x (top, left, height, width)."""
    area = (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :TRIES]) * (heights * widths)[:, None]
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first, rows = fits.argmax(1), np.arange(len(heights))
    w, h = w[rows, first], h[rows, first]
    shift = draws[:, 2 * TRIES : 2 * TRIES + 2]
    top, left = np.floor(shift[:, 0] * (heights - h + 1)), np.floor(shift[:, 1] * (widths - w + 1))
    for k in np.flatnonzero(~fits.any(1)):
        top[k], left[k], h[k], w[k] = middle_box(int(heights[k]), int(widths[k]))
    return np.stack([top, left, h, w], 1).astype(np.int64)


def middle_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest box in the middle whose aspect ratio is allowed."""
    h, w = height, width
    if w / h < RATIO[0]:
        h = round(w / RATIO[0])
    elif w / h > RATIO[1]:
        w = round(h * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def middle_squares(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The largest squares in the middle: what evaluation looks at. int64 N x (top, left, height, width)."""
    side = np.minimum(heights, widths)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)
