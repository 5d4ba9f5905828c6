"""BatchNorm and ReLU (and a residual sum before or after the BatchNorm) on channels-last activations, as Triton kernels.

A training pass reads its input twice and writes once, a backward pass reads input and gradient twice and writes once. Sums
are fp32, of means and squared distances from them (Chan et al., 1979), so that a large mean costs no digits. The programs
that sum over a part of the rows leave their parts in memory; the last to finish adds all up, always in the same order. They
ask for later tiles while they add up one (`STAGES`), and the last one for all parts at once: else they would wait for memory
most of the time.

Importing this needs Triton; `fastrobust.models.fused` does it where there is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128  # at most; one for nearly each of an H100's 132 multiprocessors. A power of two
ROWS = 64  # of a tile
# of a sum over so many tensors of half precision: rows of a tile, and tiles on their way: 48 kB, which every card has
AHEAD = {1: (128, 3), 2: (64, 3), 3: (64, 2)}


@triton.jit
def _last(counter, programs):
    """Whether this program is the last of its column to come here; what the others wrote before can be read then."""
    tl.debug_barrier()  # all threads' stores come before the count
    last = tl.atomic_add(counter + tl.program_id(1), 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter + tl.program_id(1), 0)  # for the next launch
    return last


@triton.jit
def _statistics(
    x, add, z, part, counter, mean, rstd, running_mean, running_var,
    M, C, rows, eps, momentum, unbiased,
    ADD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of each channel of M x C numbers, and the step of the running averages. With ADD z =
    x + add is written and used."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside, end = c < C, tl.minimum((p + 1) * rows, M)
    # every place of the tile has a mean and squared distances of its own: nothing is exchanged between threads on the way
    means, m2s, tiles = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32), 0.0
    for m in tl.range(p * rows, end, BM, num_stages=STAGES):
        i = m + tl.arange(0, BM)
        at, ok = i[:, None] * C + c[None, :], (i < end)[:, None] & inside[None, :]
        v = tl.load(x + at, ok, 0.0).to(tl.float32)
        if ADD:
            v = (v + tl.load(add + at, ok, 0.0).to(tl.float32)).to(z.dtype.element_ty)
            tl.store(z + at, v, ok)
            v = v.to(tl.float32)
        tiles += 1.0
        distance = tl.where(ok, v - means, 0.0)
        means += distance * (1.0 / tiles)
        m2s += distance * (v - means)
    taken = tl.maximum((end - p * rows - tl.arange(0, BM) + BM - 1) // BM, 0).to(tl.float32)[:, None]
    mu = tl.sum(taken * means, 0) / (end - p * rows)
    m2 = tl.sum(m2s + taken * (means - mu[None, :]) * (means - mu[None, :]), 0)
    tl.store(part + 2 * p * C + c, mu, inside)
    tl.store(part + (2 * p + 1) * C + c, m2, inside)
    if _last(counter, programs):
        i = tl.arange(0, BP)
        at, ok = 2 * i[:, None] * C + c[None, :], (i < programs)[:, None] & inside[None, :]
        n = tl.minimum(rows, M - i * rows).to(tl.float32)[:, None]
        theirs = tl.load(part + at, ok, 0.0, cache_modifier=".cg")
        squares = tl.load(part + at + C, ok, 0.0, cache_modifier=".cg")
        mu = tl.sum(theirs * n, 0) / M
        away = tl.where(ok, theirs - mu[None, :], 0.0)
        var = tl.sum(squares + n * away * away, 0) / M
        tl.store(mean + c, mu, inside)
        tl.store(rstd + c, 1.0 / tl.sqrt(var + eps), inside)
        old_mean, old_var = tl.load(running_mean + c, inside), tl.load(running_var + c, inside)
        tl.store(running_mean + c, old_mean * (1 - momentum) + mu * momentum, inside)
        tl.store(running_var + c, old_var * (1 - momentum) + var * unbiased * momentum, inside)


@triton.jit
def _channels(mean, spread, weight, bias, c, inside, eps, TRAIN: tl.constexpr):
    """Of each channel: mean, 1 / standard deviation, and the factor and the number added that normalise it. spread: 1 /
    standard deviation with TRAIN, else the running variance."""
    mu, rs = tl.load(mean + c, inside, 0.0).to(tl.float32), tl.load(spread + c, inside, 1.0).to(tl.float32)
    if not TRAIN:
        rs = 1.0 / tl.sqrt(rs + eps)
    a = tl.load(weight + c, inside, 0.0).to(tl.float32) * rs
    return mu, rs, a, tl.load(bias + c, inside, 0.0).to(tl.float32) - mu * a


@triton.jit
def _normalise(
    x, add, z, y, mean, spread, weight, bias,
    M, C, eps, TRAIN: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = relu(normalised x); with BEFORE of z = x + add, which is written; with AFTER y = relu(normalised x + add)."""
    i, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    at, ok = i[:, None] * C + c[None, :], (i < M)[:, None] & (c < C)[None, :]
    _, _, a, b = _channels(mean, spread, weight, bias, c, c < C, eps, TRAIN)
    v = tl.load(x + at, ok, 0.0).to(tl.float32)
    if BEFORE:
        v = (v + tl.load(add + at, ok, 0.0).to(tl.float32)).to(z.dtype.element_ty)
        tl.store(z + at, v, ok)
        v = v.to(tl.float32)
    v = v * a[None, :] + b[None, :]
    if AFTER:
        v += tl.load(add + at, ok, 0.0).to(tl.float32)
    tl.store(y + at, tl.where(v <= 0, 0.0, v).to(y.dtype.element_ty), ok)  # NaN stays NaN, as in torch


@triton.jit
def _through_relu(v, dy, y, at, ok, a, b, AFTER: tl.constexpr):
    """The gradient before the ReLU: dy where the ReLU let the number through."""
    d = tl.load(dy + at, ok, 0.0).to(tl.float32)
    if AFTER:
        return tl.where(tl.load(y + at, ok, 0.0).to(tl.float32) <= 0, 0.0, d)
    return tl.where(v * a[None, :] + b[None, :] <= 0, 0.0, d)


@triton.jit
def _sums_of_gradients(
    x, dy, y, part, counter, mean, spread, weight, bias, dweight, dbias,
    M, C, rows, eps,
    TRAIN: tl.constexpr, AFTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias: of each channel the sums of d x̂ and of d, the gradient before the ReLU."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside, end = c < C, tl.minimum((p + 1) * rows, M)
    mu, rs, a, b = _channels(mean, spread, weight, bias, c, inside, eps, TRAIN)
    s, t = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    for m in tl.range(p * rows, end, BM, num_stages=STAGES):
        i = m + tl.arange(0, BM)
        at, ok = i[:, None] * C + c[None, :], (i < end)[:, None] & inside[None, :]
        v = tl.load(x + at, ok, 0.0).to(tl.float32)
        d = _through_relu(v, dy, y, at, ok, a, b, AFTER)
        s += d
        t += d * (v - mu[None, :])
    tl.store(part + 2 * p * C + c, tl.sum(s, 0), inside)
    tl.store(part + (2 * p + 1) * C + c, tl.sum(t, 0) * rs, inside)
    if _last(counter, programs):
        i = tl.arange(0, BP)
        at, ok = 2 * i[:, None] * C + c[None, :], (i < programs)[:, None] & inside[None, :]
        tl.store(dbias + c, tl.sum(tl.load(part + at, ok, 0.0, cache_modifier=".cg"), 0), inside)
        tl.store(dweight + c, tl.sum(tl.load(part + at + C, ok, 0.0, cache_modifier=".cg"), 0), inside)


@triton.jit
def _gradient(
    x, dy, dz, y, dx, dadd, mean, spread, weight, bias, dweight, dbias, M, C, eps,
    TRAIN: tl.constexpr, SUM: tl.constexpr, AFTER: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of x; with SUM dz, what else x's gradient is made of, is added; with AFTER dadd is written too."""
    i, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    at, ok = i[:, None] * C + c[None, :], (i < M)[:, None] & (c < C)[None, :]
    mu, rs, a, b = _channels(mean, spread, weight, bias, c, c < C, eps, TRAIN)
    v = tl.load(x + at, ok, 0.0).to(tl.float32)
    d = _through_relu(v, dy, y, at, ok, a, b, AFTER)
    if AFTER:
        tl.store(dadd + at, d.to(dadd.dtype.element_ty), ok)
    if TRAIN:
        t, s = tl.load(dweight + c, c < C, 0.0) / M, tl.load(dbias + c, c < C, 0.0) / M
        d = d - s[None, :] - (v - mu[None, :]) * rs[None, :] * t[None, :]
    d = d * a[None, :]
    if SUM:
        d += tl.load(dz + at, ok, 0.0).to(tl.float32)
    tl.store(dx + at, d.to(dx.dtype.element_ty), ok)


_counters: dict[tuple, Tensor] = {}


def _counter(x: Tensor, columns: int) -> Tensor:
    """Zeros that the kernels count in and leave as zeros; those of one stream never run at the same time."""
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if key not in _counters or len(_counters[key]) < columns:
        _counters[key] = torch.zeros(max(columns, 256), dtype=torch.int32, device=x.device)
    return _counters[key]


def _shape(x: Tensor) -> tuple[int, int, int]:
    """(rows, channels, channels of a tile) of x, N x C x H x W in channels-last memory."""
    channels = x.shape[1]
    return x.numel() // channels, channels, min(64, max(16, triton.next_power_of_2(channels)))


def _split(m: int, columns: int, tile: int) -> int:
    """Rows for each program of a sum over m rows: whole tiles, and at most PROGRAMS programs for all columns."""
    return tile * max(1, triton.cdiv(m, tile * max(1, PROGRAMS // columns)))


@torch.library.custom_op("fastrobust::norm_relu", mutates_args=("running_mean", "running_var"))
def norm_relu(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, train: bool, after: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(z, y, mean, 1 / standard deviation): z = x + add (empty without `add`, or where it is added `after`), y =
    relu(batch_norm(z)) or relu(batch_norm(x) + add). The last two are empty unless `train`."""
    (m, c, bc), before = _shape(x), add is not None and not after
    z, y, mean, rstd = _made(x, before, train, c)
    columns, given = triton.cdiv(c, bc), x if add is None else add
    seen = x
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        if train:
            tile, stages = AHEAD[1 + before] if x.element_size() == 2 else (ROWS, 1)
            rows = _split(m, columns, tile)
            grid = triton.cdiv(m, rows), columns
            part = torch.empty(grid[0], 2, c, device=x.device)
            _statistics[grid](
                x, given, z, part, _counter(x, columns), mean, rstd, running_mean, running_var,
                m, c, rows, eps, momentum, m / (m - 1), ADD=before, BM=tile, BC=bc, BP=PROGRAMS, STAGES=stages, num_warps=8,
            )  # fmt: skip
            seen = z if before else x
        _normalise[triton.cdiv(m, ROWS), columns](
            seen, given, z, y, mean if train else running_mean, rstd if train else running_var, weight, bias,
            m, c, eps, TRAIN=train, BEFORE=before and not train, AFTER=after, BM=ROWS, BC=bc,
        )  # fmt: skip
    return z, y, mean, rstd


def _made(x: Tensor, before: bool, train: bool, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = (x.new_empty(channels if train else 0, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x) if before else x.new_empty(0), torch.empty_like(x), *statistics


@norm_relu.register_fake
def _(x, add, weight, bias, running_mean, running_var, momentum, eps, train, after):
    return _made(x, add is not None and not after, train, x.shape[1])


@torch.library.custom_op("fastrobust::norm_relu_backward", mutates_args=())
def norm_relu_backward(
    x: Tensor, dy: Tensor, dz: Tensor | None, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, spread: Tensor,
    eps: float, train: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dadd, dweight, dbias). x: what was normalised; y: given where the sum came after; dadd is empty elsewhere.
    spread: 1 / standard deviation, or the running variance without `train`. The last two are empty unless `sums`."""
    m, c, bc = _shape(x)
    dx, dadd, dweight, dbias = _gradients(x, y, sums)
    columns, after = triton.cdiv(c, bc), y is not None
    if sums:
        tile, stages = AHEAD[2 + after] if x.element_size() == 2 else (ROWS, 1)
        rows = _split(m, columns, tile)
        grid = triton.cdiv(m, rows), columns
        part = torch.empty(grid[0], 2, c, device=x.device)
        _sums_of_gradients[grid](
            x, dy, y if after else x, part, _counter(x, columns), mean, spread, weight, bias, dweight, dbias,
            m, c, rows, eps, TRAIN=train, AFTER=after, BM=tile, BC=bc, BP=PROGRAMS, STAGES=stages, num_warps=8,
        )  # fmt: skip
    _gradient[triton.cdiv(m, ROWS), columns](
        x, dy, x if dz is None else dz, y if after else x, dx, dadd, mean, spread, weight, bias, dweight, dbias,
        m, c, eps, TRAIN=train, SUM=dz is not None, AFTER=after, BM=ROWS, BC=bc,
    )  # fmt: skip
    return dx, dadd, dweight, dbias


def _gradients(x: Tensor, y: Tensor | None, sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = (x.new_empty(x.shape[1] if sums else 0, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(x), *channels


@norm_relu_backward.register_fake
def _(x, dy, dz, y, weight, bias, mean, spread, eps, train, sums):
    return _gradients(x, y, sums)
