"""BatchNorm and ReLU (and a residual sum before the BatchNorm) on channels-last activations, on a CPU, by the kernels of
`norm_numba_kernels.py`. A training pass reads its input twice and writes once, a backward pass reads input and gradient
twice and writes once; torch's operations go through memory about twice as often.

Sums are of blocks of rows, always the same blocks, so that the number of threads changes no bit. Importing this needs numba.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastrobust.models import norm_numba_kernels as kernels
from fastrobust.runtime.shared_work import by_threads

LONG = 1024  # numbers of a row, about: several positions of an image together
FEW = 8  # rows
BLOCKS, BLOCK = 32, 2**17  # blocks of rows at most, numbers of a block at least


def norm_relu(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, train: bool, after: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(z, y, mean, 1 / standard deviation): z = x + add (empty without `add`), y = relu(batch_norm(z)). The last two are
    empty unless `train`. after: False, for there is no kernel that adds after the BatchNorm."""
    channels, times = x.shape[1], _times(x)
    z, y = x.new_empty(0) if add is None else torch.empty_like(x), torch.empty_like(x)
    given, out = _rows(x, times), _rows(y, times)
    summed = None if add is None else (_rows(add, times), _rows(z, times))
    mean, rstd = running_mean, (running_var + eps).rsqrt()
    if train:
        mean, var = _statistics(given, summed, channels)
        rstd, m = (var + eps).rsqrt(), x.numel() // channels
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * m / (m - 1))
    elif summed:
        _each(kernels.add, given, *summed)
    a = weight * rstd
    _each(kernels.normalise, summed[1] if summed else given, out, *_repeated(times, a, bias - mean * a))
    return z, y, *((mean, rstd) if train else (x.new_empty(0), x.new_empty(0)))


def norm_relu_backward(
    x: Tensor, dy: Tensor, dz: Tensor | None, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor,
    eps: float, train: bool, sums: bool,
) -> tuple[Tensor, None, Tensor, Tensor]:  # fmt: skip
    """(dx, None, dweight, dbias). x: what was normalised; y: None. spread: 1 / standard deviation, or the running variance
    without `train`. The last two are empty unless `sums`."""
    times, m, dx = _times(x), x.numel() // x.shape[1], torch.empty_like(x)
    rstd = spread if train else (spread + eps).rsqrt()
    a = weight * rstd
    b = bias - mean * a
    given, dy = _rows(x, times), _rows(dy, times)
    dweight, dbias = x.new_empty(0), x.new_empty(0)
    if sums:
        found = _summed(kernels.sums_of_gradients, (given, dy), _repeated(times, a, b, mean), x.shape[1])
        dbias, dweight = found[0].sum((0, 1)).float(), (found[1].sum((0, 1)) * rstd).float()
    p, q = (-a * rstd * dweight / m, -a * dbias / m) if train else (torch.zeros_like(a), torch.zeros_like(a))
    channels = _repeated(times, a, b, mean, p, q)
    if dz is None:
        _each(kernels.gradient, given, dy, _rows(dx, times), *channels)
    else:
        _each(kernels.gradient_and, given, dy, _rows(dz, times), _rows(dx, times), *channels)
    return dx, None, dweight, dbias


def _statistics(x: np.ndarray, summed: tuple | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel. Sums are of distances from an origin, the mean of a few rows: a large mean costs no
    digits."""
    few = np.arange(FEW) * len(x) // FEW
    origin = _numbers(x[few]).mean(0) + (_numbers(summed[0][few]).mean(0) if summed else np.float32(0))
    if summed:
        s, q = _summed(kernels.statistics_of_sum, (x, *summed), (origin,), channels)
    else:
        s, q = _summed(kernels.statistics, (x,), (origin,), channels)
    n = torch.tensor([last - first for first, last in _blocks(x)], dtype=torch.float64)[:, None, None]
    means = torch.from_numpy(origin).double().view(1, -1, channels) + s / n
    m = len(x) * s.shape[1]
    mean = (means * n).sum((0, 1)) / m
    var = ((q - s * s / n) + n * (means - mean) ** 2).sum((0, 1)) / m
    return mean.float(), var.clamp(min=0).float()


def _times(x: Tensor) -> int:
    """How many positions of the images make a row."""
    channels, times = x.shape[1], 1
    positions = x.numel() // channels
    while times * channels < LONG and positions % (2 * times) == 0:
        times *= 2
    return times


def _rows(x: Tensor, times: int) -> np.ndarray:
    """G x L, of the same memory."""
    flat = x.detach().permute(0, 2, 3, 1).reshape(-1, times * x.shape[1])
    return flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()


def _numbers(stored: np.ndarray) -> np.ndarray:
    """float32."""
    return stored if stored.dtype == np.float32 else (stored.astype(np.uint32) << 16).view(np.float32)


def _repeated(times: int, *of_channels: Tensor) -> list[np.ndarray]:
    return [t.detach().float().repeat(times).numpy() for t in of_channels]


def _blocks(x: np.ndarray) -> list[tuple[int, int]]:
    """(first row, row after the last) of each block."""
    rows, blocks = len(x), max(1, min(BLOCKS, len(x), x.size // BLOCK))
    ends = [k * rows // blocks for k in range(blocks + 1)]
    return list(pairwise(ends))


def _each(kernel: Callable, *arrays: np.ndarray) -> None:
    """The last rows come first: a sum that went before has left them in the processor's cache."""
    blocks = _blocks(arrays[0])

    def work(first: int, last: int) -> None:
        for block in reversed(blocks[first:last]):
            kernel(*arrays, *block)

    by_threads(work, len(blocks))


def _summed(kernel: Callable, activations: tuple, of_channels: tuple | list, channels: int) -> Tensor:
    """The two sums of each block of rows: float64, 2 x blocks x positions of a row x channels."""
    blocks = _blocks(activations[0])
    sums = np.zeros((2, len(blocks), activations[0].shape[1]), np.float32)

    def work(first: int, last: int) -> None:
        for k in range(first, last):
            kernel(*activations, *of_channels, *sums, k, *blocks[k])

    by_threads(work, len(blocks))
    return torch.from_numpy(sums).double().view(2, len(blocks), -1, channels)
