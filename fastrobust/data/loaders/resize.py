"""A box of an image, resized by two filters: the mean of the area that each pixel covers, with the bits of OpenCV's
INTER_AREA in a quarter of its time, and the triangle of DALI's and Pillow's linear filter. Every row of the image is added
up across once, not for each row of the result, in loops that the compiler vectorises.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from fastrobust.runtime.compiled import compiled


@compiled()
def area(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `count` pixels out of `size`: the first that it covers, the shares of that and of those after it."""
    scale = 1.0 / (count / size)
    first, share = np.zeros(count, np.int64), np.zeros((max(3, int(scale) + 2), count), np.float32)
    for d in range(count):
        start, k = d * scale, 0
        end, cell = start + scale, min(scale, size - start)
        last = min(math.floor(end), size - 1)
        whole = first[d] = min(math.ceil(start), last)
        if whole - start > 1e-3:
            first[d], share[0, d], k = whole - 1, (whole - start) / cell, 1
        for _ in range(whole, last):
            share[k, d] = 1.0 / cell
            k += 1
        if end - last > 1e-3:
            share[k, d] = min(min(end - last, 1.0), cell) / cell
    return first, share


@compiled()
def triangle(start: int, length: int, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of `count` pixels out of `length` from `start`, by a triangle around each; it reaches beyond these, but not
    beyond the `size` that there are."""
    scale = length / count
    reach = max(1.0, scale)
    first, share = np.zeros(count, np.int64), np.zeros((max(3, int(2 * reach) + 2), count), np.float32)
    for d in range(count):
        centre = start + (d + 0.5) * scale - 0.5
        low, high, total = math.ceil(centre - reach), math.floor(centre + reach), 0.0
        for i in range(low, high + 1):
            total += 1 - abs(i - centre) / reach
        first[d] = min(max(low, 0), size - 1)
        for i in range(low, high + 1):
            share[min(max(i, 0), size - 1) - first[d], d] += (1 - abs(i - centre) / reach) / total
    return first, share


@compiled()
def across(pixels: np.ndarray, line: np.ndarray, first: np.ndarray, share: np.ndarray, row: np.ndarray):
    """Fill row, 3 w floats, with the sums of pixels, 3 W bytes. line: room for these as floats, with zeros behind them."""
    for i in range(len(pixels)):
        line[i] = pixels[i]
    for x in range(len(first)):
        i, j, a, b, c = 3 * first[x], 3 * x, share[0, x], share[1, x], share[2, x]
        row[j] = line[i] * a + line[i + 3] * b + line[i + 6] * c
        row[j + 1] = line[i + 1] * a + line[i + 4] * b + line[i + 7] * c
        row[j + 2] = line[i + 2] * a + line[i + 5] * b + line[i + 8] * c
    for k in range(3, len(share)):
        for x in range(len(first)):
            i, j, a = 3 * (first[x] + k), 3 * x, share[k, x]
            row[j] += line[i] * a
            row[j + 1] += line[i + 1] * a
            row[j + 2] += line[i + 2] * a


@compiled()
def added_up(image: np.ndarray, top: int, left: int, width: int, columns: tuple, rows: tuple, mirror: bool, out: np.ndarray):
    """Fill out, uint8 h x w x 3, by these shares of an image's columns, from `left` to `left + width`, and of its rows from
    `top` on."""
    first, share = columns
    above, weight = rows
    if mirror:
        first, share = first[::-1].copy(), share[:, ::-1].copy()
    lines, start, stop = image.reshape(image.shape[0], -1), 3 * left, 3 * (left + width)
    kept, line = len(weight), np.zeros(stop - start + 3 * len(share), np.float32)
    sums, total = np.empty((kept, 3 * len(first)), np.float32), np.empty(3 * len(first), np.float32)
    done = above[0] - 1
    for y in range(len(above)):
        total[:] = 0
        for k in range(kept):
            if weight[k, y] > 0:
                i = above[y] + k
                while done < i:
                    done += 1
                    across(lines[top + done, start:stop], line, first, share, sums[done % kept])
                row = sums[i % kept]
                for x in range(len(row)):
                    total[x] += weight[k, y] * row[x]
        pixels = out[y].reshape(-1)
        for x in range(len(total)):
            pixels[x] = np.uint8(np.rint(total[x]))


IMAGE = types.Array(types.uint8, 3, "C", readonly=True)
BOXED = types.void(IMAGE, *4 * [types.int64], types.bool, types.uint8[:, :, ::1])


@compiled(BOXED)
def shrink(image: np.ndarray, top: int, left: int, height: int, width: int, mirror: bool, out: np.ndarray):
    """Fill out, uint8 h x w x 3, by area with a box of image, uint8 H x W x 3, that is at least as large; both are
    contiguous."""
    added_up(image, top, left, width, area(width, out.shape[1]), area(height, out.shape[0]), mirror, out)


@compiled(BOXED)
def smooth(image: np.ndarray, top: int, left: int, height: int, width: int, mirror: bool, out: np.ndarray):
    """The same by triangles: the box may be smaller, too."""
    columns = triangle(left, width, image.shape[1], out.shape[1])
    rows = triangle(top, height, image.shape[0], out.shape[0])
    added_up(image, 0, 0, image.shape[1], columns, rows, mirror, out)
