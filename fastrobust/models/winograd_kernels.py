"""The transforms of F(4 x 4, 3 x 3) (`winograd.py`), as machine code. Images are float32 N x H x W x C, tiles 36 x T x C.
T is N x h x w tiles of 4 x 4 pixels, h = H / 4 and w = W / 4 rounded up. Beyond the image a tile is zero, or is left out.

Each kernel does the images from `first` to before `last` alone, so that several threads can share the work. A tile is
transformed along its columns, then along its rows.
"""

from __future__ import annotations

import numpy as np
from numba import types

from fastrobust.runtime.compiled import compiled

IMAGES, TILES = types.float32[:, :, :, ::1], types.float32[:, :, ::1]
WORK = (IMAGES, TILES, types.int64, types.int64)
TWO, FOUR, FIVE, EIGHT = (np.float32(n) for n in (2, 4, 5, 8))


@compiled(inline="always")
def six_to_six(a, b, c, d, e, f, p, q, r, s, t, u):
    """(a to f) into (p to u), for all channels."""
    for k in range(len(a)):
        x, y = e[k] - FOUR * c[k], d[k] - FOUR * b[k]
        z, w = e[k] - c[k], TWO * (d[k] - b[k])
        p[k], u[k] = FOUR * a[k] - FIVE * c[k] + e[k], FOUR * b[k] - FIVE * d[k] + f[k]
        q[k], r[k], s[k], t[k] = x + y, x - y, z + w, z - w


@compiled(inline="always")
def six_to_four(a, b, c, d, e, f, p, q, r, s):
    for k in range(len(a)):
        x, y, z, w = b[k] + c[k], b[k] - c[k], d[k] + e[k], d[k] - e[k]
        p[k], q[k], r[k], s[k] = a[k] + x + z, y + TWO * w, x + FOUR * z, y + EIGHT * w + f[k]


@compiled(inline="always")
def four_to_six(a, b, c, d, p, q, r, s, t, u):
    """The adjoint of six_to_four."""
    for k in range(len(a)):
        x, y, z, w = a[k] + c[k], b[k] + d[k], a[k] + FOUR * c[k], TWO * b[k] + EIGHT * d[k]
        p[k], q[k], r[k], s[k], t[k], u[k] = a[k], x + y, x - y, z + w, z - w, d[k]


@compiled(types.void(*WORK))
def of_inputs(x, out, first, last):
    """Tiles with a border of one pixel."""
    height, width, channels = x.shape[1:]
    columns, zero = np.empty((6, 6, channels), np.float32), np.zeros(channels, np.float32)
    tile = first * ((height + 3) // 4) * ((width + 3) // 4)
    for n in range(first, last):
        for top in range(-1, height - 1, 4):
            for left in range(-1, width - 1, 4):
                for j in range(6):
                    i, inside = left + j, 0 <= left + j < width
                    a = x[n, top, i] if inside and top >= 0 else zero
                    b = x[n, top + 1, i] if inside else zero
                    c = x[n, top + 2, i] if inside and top + 2 < height else zero
                    d = x[n, top + 3, i] if inside and top + 3 < height else zero
                    e = x[n, top + 4, i] if inside and top + 4 < height else zero
                    f = x[n, top + 5, i] if inside and top + 5 < height else zero
                    p, q, r = columns[0, j], columns[1, j], columns[2, j]
                    s, t, u = columns[3, j], columns[4, j], columns[5, j]
                    six_to_six(a, b, c, d, e, f, p, q, r, s, t, u)
                for i in range(6):
                    k = 6 * i
                    a, b, c = columns[i, 0], columns[i, 1], columns[i, 2]
                    d, e, f = columns[i, 3], columns[i, 4], columns[i, 5]
                    p, q, r = out[k, tile], out[k + 1, tile], out[k + 2, tile]
                    s, t, u = out[k + 3, tile], out[k + 4, tile], out[k + 5, tile]
                    six_to_six(a, b, c, d, e, f, p, q, r, s, t, u)
                tile += 1


@compiled(types.void(*WORK))
def of_outputs(y, out, first, last):
    """The adjoint of `joined`."""
    height, width, channels = y.shape[1:]
    columns, zero = np.empty((6, 4, channels), np.float32), np.zeros(channels, np.float32)
    tile = first * ((height + 3) // 4) * ((width + 3) // 4)
    for n in range(first, last):
        for top in range(0, height, 4):
            for left in range(0, width, 4):
                for j in range(4):
                    i, inside = left + j, left + j < width
                    a = y[n, top, i] if inside else zero
                    b = y[n, top + 1, i] if inside and top + 1 < height else zero
                    c = y[n, top + 2, i] if inside and top + 2 < height else zero
                    d = y[n, top + 3, i] if inside and top + 3 < height else zero
                    p, q, r = columns[0, j], columns[1, j], columns[2, j]
                    s, t, u = columns[3, j], columns[4, j], columns[5, j]
                    four_to_six(a, b, c, d, p, q, r, s, t, u)
                for i in range(6):
                    k = 6 * i
                    a, b, c, d = columns[i, 0], columns[i, 1], columns[i, 2], columns[i, 3]
                    p, q, r = out[k, tile], out[k + 1, tile], out[k + 2, tile]
                    s, t, u = out[k + 3, tile], out[k + 4, tile], out[k + 5, tile]
                    four_to_six(a, b, c, d, p, q, r, s, t, u)
                tile += 1


@compiled(types.void(*WORK))
def joined(y, tiles, first, last):
    """Writes the images y from their tiles."""
    height, width, channels = y.shape[1:]
    columns, beyond = np.empty((4, 6, channels), np.float32), np.empty(channels, np.float32)
    tile = first * ((height + 3) // 4) * ((width + 3) // 4)
    for n in range(first, last):
        for top in range(0, height, 4):
            for left in range(0, width, 4):
                for j in range(6):
                    a, b, c = tiles[j, tile], tiles[6 + j, tile], tiles[12 + j, tile]
                    d, e, f = tiles[18 + j, tile], tiles[24 + j, tile], tiles[30 + j, tile]
                    p, q, r, s = columns[0, j], columns[1, j], columns[2, j], columns[3, j]
                    six_to_four(a, b, c, d, e, f, p, q, r, s)
                for i in range(min(4, height - top)):
                    a, b, c = columns[i, 0], columns[i, 1], columns[i, 2]
                    d, e, f = columns[i, 3], columns[i, 4], columns[i, 5]
                    p = y[n, top + i, left]
                    q = y[n, top + i, left + 1] if left + 1 < width else beyond
                    r = y[n, top + i, left + 2] if left + 2 < width else beyond
                    s = y[n, top + i, left + 3] if left + 3 < width else beyond
                    six_to_four(a, b, c, d, e, f, p, q, r, s)
                tile += 1
