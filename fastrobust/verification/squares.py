"""Adversarial images without a gradient: squares of pixels are set to an end of their range, and what brings the margin
down is kept (after Square, Andriushchenko et al., 2020). The best points are disturbed and followed down again (iterated
local search). Where filters are thresholds the slope says nothing, and this finds what gradients do not."""

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import torch
from torch import Tensor

CHAINS = 96  # points that are followed at once
FIRST, ROUNDS = 300, 150  # moves of a chain, from stripes and after a disturbance
SLICE = 25  # moves between two looks at the clock
KEPT = 3  # classes that are followed at once, after the first time
ENOUGH = -1e-4  # a margin that rounding does not make


class Squares:
    """The search for one image. margin: of points (N x C x H x W) to a class each (int64 N). low, high: of every pixel, C x
    H x W. classes: int64, those that may be reached. least, best: the least margin to each of them so far, and where."""

    def __init__(
        self, margin: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor, classes: Tensor, seed: int = 0
    ):
        self.margin, self.low, self.high, self.classes = margin, low, high, classes
        self.generator = torch.Generator().manual_seed(seed)
        self.asked, self.slices = torch.arange(len(classes)), self.chains()
        self.least, self.best = torch.full((len(classes),), torch.inf), low.repeat(len(classes), 1, 1, 1)

    def follow(self, asked: list[int]) -> Tensor | None:
        """SLICE moves of all chains, towards the classes with these numbers. Gives a point whose margin is below ENOUGH, if
        one was found."""
        self.asked = torch.tensor(asked)
        return next(self.slices)

    def chains(self) -> Iterator[Tensor | None]:
        """Chains from stripes towards all classes, then again and again from the best points of the KEPT nearest classes.
        Stops after every SLICE moves."""
        for rounds in chain([FIRST], repeat(ROUNDS)):
            numbers = self.asked
            if rounds == ROUNDS:
                numbers = numbers[self.least[numbers].topk(min(KEPT, len(numbers)), largest=False).indices]
            mine = numbers.repeat(-(-CHAINS // len(numbers)))
            points = self.stripes(len(mine)) if rounds == FIRST else self.disturbed(self.best[mine])
            values = self.margin(points, self.classes[mine])
            for k in range(rounds):
                moved = self.moved(points, 1 + int((1 - k / rounds) ** 2 * min(self.low.shape[-2:]) / 3))
                fresh = self.margin(moved, self.classes[mine])
                points = torch.where((fresh < values)[:, None, None, None], moved, points)
                values = torch.minimum(fresh, values)
                if values.min() < ENOUGH:
                    yield points[values.argmin()]
                elif k % SLICE == SLICE - 1:
                    yield None
            for i in numbers.tolist():
                at = torch.where(mine == i, values, torch.inf).argmin()
                if values[at] < self.least[i]:
                    self.least[i], self.best[i] = values[at], points[at]

    def stripes(self, count: int) -> Tensor:
        """Points whose columns are each at one end."""
        up = torch.rand(count, self.low.shape[0], 1, self.low.shape[2], generator=self.generator) < 0.5
        return torch.where(up, self.high, self.low)

    def moved(self, points: Tensor, side: int) -> Tensor:
        """The points with a square each set to one end."""
        up = torch.rand(len(points), 1, 1, 1, generator=self.generator) < 0.5
        return torch.where(self.squares(len(points), side), torch.where(up, self.high, self.low), points)

    def disturbed(self, points: Tensor) -> Tensor:
        """The points with the pixels of a square each set to random ends."""
        side = int(torch.randint(2, 2 + min(self.low.shape[-2:]) // 3, (), generator=self.generator))
        up = torch.rand(points.shape, generator=self.generator) < 0.5
        return torch.where(self.squares(len(points), side), torch.where(up, self.high, self.low), points)

    def squares(self, count: int, side: int) -> Tensor:
        """A square of one channel at a random place for each of `count` points, bool, count x C x H x W."""
        inside = []
        for size, length in zip(self.low.shape, (1, side, side), strict=True):
            start, at = torch.randint(size - length + 1, (count, 1), generator=self.generator), torch.arange(size)
            inside.append((at >= start) & (at < start + length))
        return inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]
