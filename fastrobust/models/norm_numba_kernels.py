"""BatchNorm and ReLU on a CPU (`norm_numba.py`), as machine code. Numbers are float32, or bf16 as the uint16 of its bits;
arithmetic and sums are float32.

Activations are G x L: every row holds the same channels, all of them once or several times, and what belongs to a channel
comes as L numbers. So all loops run along memory, and a processor does many steps of them at once. Each kernel does the rows
from `first` to before `last`; sums go to rows of their own for each block of rows.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastrobust.runtime.compiled import compiled

KINDS = types.uint16, types.float32
ROW, SUMS, ROWS = types.float32[::1], types.float32[:, ::1], (types.int64, types.int64)
ZERO = np.float32(0)


def signatures(activations: int, channels: int, sums: int = 0) -> list:
    """Of a kernel that takes so many activations, then so many numbers for each channel, then so many sums of blocks."""
    after = (ROW,) * channels + (SUMS,) * sums + ((types.int64,) if sums else ())
    return [types.void(*(kind[:, ::1],) * activations, *after, *ROWS) for kind in KINDS]


@intrinsic
def number(context, stored):
    """The float32 that is stored as bf16 or as itself."""

    def made(context, builder, signature, arguments):
        if stored == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, bits.type(16)), ir.FloatType())

    return types.float32(stored), made


@intrinsic
def stored_like(context, value, example):
    """A float32 as it is stored: bf16 is rounded to the nearest, and to even between two. NaN stays NaN."""

    def made(context, builder, signature, arguments):
        if example == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        number, odd = bits.type, builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
        rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
        is_number = builder.fcmp_ordered("ord", arguments[0], arguments[0])
        kept = builder.select(is_number, builder.lshr(rounded, number(16)), number(0x7FC0))
        return builder.trunc(kept, ir.IntType(16))

    return example(types.float32, example), made


@compiled(signatures(1, 1, 2))
def statistics(x, origin, sums, squares, block, first, last):
    """Sums of x - origin and of its squares."""
    s, q = sums[block], squares[block]
    for i in range(first, last):
        row = x[i]
        for k in range(len(row)):
            d = number(row[k]) - origin[k]
            s[k] += d
            q[k] += d * d


@compiled(signatures(3, 0))
def add(x, other, z, first, last):
    for i in range(first, last):
        row, more, out = x[i], other[i], z[i]
        for k in range(len(row)):
            out[k] = stored_like(number(row[k]) + number(more[k]), row[k])


@compiled(signatures(3, 1, 2))
def statistics_of_sum(x, other, z, origin, sums, squares, block, first, last):
    """Writes z = x + other, and gives its statistics."""
    s, q = sums[block], squares[block]
    for i in range(first, last):
        row, more, out = x[i], other[i], z[i]
        for k in range(len(row)):
            rounded = stored_like(number(row[k]) + number(more[k]), row[k])
            out[k] = rounded
            d = number(rounded) - origin[k]
            s[k] += d
            q[k] += d * d


@compiled(signatures(2, 2))
def normalise(x, y, a, b, first, last):
    """y = relu(a x + b)."""
    for i in range(first, last):
        row, out = x[i], y[i]
        for k in range(len(row)):
            v = number(row[k]) * a[k] + b[k]
            out[k] = stored_like(ZERO if v <= ZERO else v, row[k])  # NaN stays NaN, as in torch


@compiled(signatures(2, 3, 2))
def sums_of_gradients(x, dy, a, b, mean, sums, products, block, first, last):
    """Sums of d, the gradient before the ReLU, and of d (x - mean)."""
    s, t = sums[block], products[block]
    for i in range(first, last):
        row, given = x[i], dy[i]
        for k in range(len(row)):
            v = number(row[k])
            d = ZERO if v * a[k] + b[k] <= ZERO else number(given[k])
            s[k] += d
            t[k] += d * (v - mean[k])


@compiled(signatures(3, 5))
def gradient(x, dy, dx, a, b, mean, p, q, first, last):
    """dx = a d + p (x - mean) + q."""
    for i in range(first, last):
        row, given, out = x[i], dy[i], dx[i]
        for k in range(len(row)):
            v = number(row[k])
            d = ZERO if v * a[k] + b[k] <= ZERO else number(given[k])
            out[k] = stored_like(a[k] * d + (v - mean[k]) * p[k] + q[k], row[k])


@compiled(signatures(4, 5))
def gradient_and(x, dy, dz, dx, a, b, mean, p, q, first, last):
    """The same, plus dz."""
    for i in range(first, last):
        row, given, more, out = x[i], dy[i], dz[i], dx[i]
        for k in range(len(row)):
            v = number(row[k])
            d = ZERO if v * a[k] + b[k] <= ZERO else number(given[k])
            out[k] = stored_like(a[k] * d + (v - mean[k]) * p[k] + q[k] + number(more[k]), row[k])
