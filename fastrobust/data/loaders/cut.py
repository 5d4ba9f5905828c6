"""The part of a JPEG that holds a box, out of one that `prepared/regions.py` made: the MCUs that the box touches, behind the
same header with another height and width. In Python this took a seventh of the loader's time, under the interpreter's lock.
"""

from __future__ import annotations

import numpy as np
from numba import types

from fastrobust.data.prepared.regions import EOI, NUMBERS, PLACE, RESTART, SIGN
from fastrobust.runtime.compiled import compiled

MARK = tuple(SIGN)
BYTES = types.Array(types.uint8, 1, "C", readonly=True)


@compiled()
def number(data: np.ndarray, place: int) -> int:
    return np.int64(data[place]) << 8 | np.int64(data[place + 1])


@compiled()
def length(data: np.ndarray, first: int, last: int) -> int:
    """Bytes of the MCUs `first` to `last` - 1, whose lengths begin at NUMBERS + 4."""
    total = 0
    for place in range(NUMBERS + 4 + 2 * first, NUMBERS + 4 + 2 * last, 2):
        total += np.int64(data[place]) | np.int64(data[place + 1]) << 8
    return total


@compiled(types.UniTuple(types.int64, 3)(BYTES, *4 * [types.int64], types.uint8[::1]))
def cut(data: np.ndarray, top: int, left: int, height: int, width: int, out: np.ndarray) -> tuple[int, int, int]:
    """Write the smallest JPEG that holds the box into out, as long as data at least. Gives (its length, the row and
    the column of the image at which it begins); a length of 0 if data has no lengths of MCUs, or odd ones: then it is to be
    decoded whole. One pixel more on each side is in it, from which decoders interpolate colours."""
    if len(data) < NUMBERS + 4:
        return 0, 0, 0
    for i in range(len(MARK)):
        if data[PLACE + 4 + i] != MARK[i]:
            return 0, 0, 0
    end = PLACE + 2 + number(data, PLACE + 2)
    frame = end + (np.int64(data[NUMBERS]) | np.int64(data[NUMBERS + 1]) << 8)
    scan = end + (np.int64(data[NUMBERS + 2]) | np.int64(data[NUMBERS + 3]) << 8)
    if not end <= frame <= scan - 12 <= len(data) - 12:
        return 0, 0, 0
    whole_height, whole_width = number(data, frame + 5), number(data, frame + 7)
    high, wide = np.int64(data[frame + 11] & 15) * 8, np.int64(data[frame + 11] >> 4) * 8  # of an MCU
    if min(high, wide) < 8:
        return 0, 0, 0
    rows, columns = -(-whole_height // high), -(-whole_width // wide)
    y, bottom = max(top - 1, 0) // high, min((top + height) // high + 1, rows)
    x, right = max(left - 1, 0) // wide, min((left + width) // wide + 1, columns)
    known = NUMBERS + 4 + 2 * rows * columns <= end and y < bottom and x < right
    if not known or scan + length(data, 0, bottom * columns) > len(data):
        return 0, 0, 0
    n = PLACE + scan - end
    out[:PLACE], out[PLACE:n] = data[:PLACE], data[end:scan]
    place, mark = frame - end + PLACE + 5, 0
    sizes = min(bottom * high, whole_height) - y * high, min(right * wide, whole_width) - x * wide
    out[place], out[place + 1], out[place + 2], out[place + 3] = sizes[0] >> 8, sizes[0] & 255, sizes[1] >> 8, sizes[1] & 255
    start = scan + length(data, 0, y * columns)
    for first in range(y * columns, bottom * columns, columns):
        begin = start + length(data, first, first + x)
        stop = begin + length(data, first + x, first + right)
        out[n : n + stop - begin] = data[begin:stop]
        for k in range(first + x, first + right):
            n += length(data, k, k + 1)
            out[n - 1] = RESTART + mark % 8  # counted from the first MCU of the part
            mark += 1
        start = stop + length(data, first + right, first + columns)
    out[n - 1] = EOI
    return n, y * high, x * wide


def part(data: bytes, box: tuple[int, int, int, int], room: np.ndarray) -> tuple[bytes | np.ndarray, int, int]:
    """(a JPEG that holds the box (top, left, height, width), the row and the column at which it begins): in room, or the
    whole image where it cannot be cut."""
    count, y, x = cut(np.frombuffer(data, np.uint8), *box, room)
    return (room[:count] if count else data), y, x
