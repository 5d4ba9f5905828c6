"""JPEGs of which a part can be decoded alone, by any decoder.

A restart marker follows every MCU, the block of 16 x 16 pixels that a JPEG is made of, so that no MCU needs those before it.
A segment that decoders skip holds their lengths. The MCUs that a box touches, behind the same header with another height and
width, are a valid JPEG: `cut` makes it. It takes one pixel more on each side, from which decoders interpolate colours: what
is in the box has the same pixels as in the whole image. The markers add 5 % to a file, the lengths 2.5 %.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SOF0, EOI, SOS, APP9 = 0xC0, 0xD9, 0xDA, 0xE9
SIGN = b"MCU lengths\0"
PLACE = 20  # behind SOI and JFIF's segment, which has no other length without a thumbnail
LENGTHS = PLACE + 4 + len(SIGN)  # where they begin
MOST = (65535 - 2 - len(SIGN)) // 2  # MCUs whose lengths fit into a segment: 8 megapixels
RESTARTS = (0xD0 + np.arange(MOST) % 8).astype(np.uint8)


def encode(image: Image.Image, quality: int) -> bytes:
    """The RGB image as a JPEG whose parts can be decoded alone; a plain one if it is too large for that."""
    if -(-image.width // 16) * -(-image.height // 16) > MOST:
        return _saved(image, quality=quality)
    data = _saved(image, quality=quality, restart_marker_blocks=1)
    _, scan = _header(data, PLACE)
    stream = np.frombuffer(data, np.uint8)
    after = np.flatnonzero(stream[scan:-1] == 255) + scan + 1
    ends = after[stream[after] >= RESTARTS[0]] + 1  # of each MCU, its marker included: a 255 of an MCU's own has a 0 behind it
    lengths = np.diff(ends, prepend=scan).astype("<u2").tobytes()
    segment = bytes((255, APP9)) + (2 + len(SIGN) + len(lengths)).to_bytes(2, "big") + SIGN + lengths
    return data[:PLACE] + segment + data[PLACE:]


def _saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _header(data: bytes, start: int) -> tuple[int, int]:
    """Where the frame header and the coded pixels are, of a JPEG of one scan; `start`: where one of its segments begins."""
    frame, place, kind = 0, start, 0
    while kind != SOS:
        kind, place, before = data[place + 1], place + 2 + (data[place + 2] << 8 | data[place + 3]), place
        if kind == SOF0:
            frame = before
    return frame, place


def cut(data: bytes, top: int, left: int, height: int, width: int) -> tuple[bytes | bytearray, int, int]:
    """(a JPEG that holds the box, the row and the column of the image at which it begins): the smallest that there is, or
    the image itself where `encode` did not make it."""
    if data[PLACE + 4 : LENGTHS] != SIGN:
        return data, 0, 0
    end = PLACE + 2 + (data[PLACE + 2] << 8 | data[PLACE + 3])
    frame, scan = _header(data, end)
    whole_height, whole_width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    high, wide = (data[frame + 11] & 15) * 8, (data[frame + 11] >> 4) * 8  # of an MCU
    lengths = np.frombuffer(data, "<u2", (end - LENGTHS) // 2, LENGTHS).reshape(-1, -(-whole_width // wide))
    y, bottom = max(top - 1, 0) // high, min(-(-(top + height + 1) // high), lengths.shape[0])
    x, right = max(left - 1, 0) // wide, min(-(-(left + width + 1) // wide), lengths.shape[1])
    ends = lengths.ravel().cumsum().reshape(lengths.shape)[y:bottom] + scan
    starts = (ends[:, x] - lengths[y:bottom, x]).tolist()
    head = bytearray(data[:PLACE] + data[end:scan])
    frame += PLACE - end
    head[frame + 5 : frame + 7] = (min(bottom * high, whole_height) - y * high).to_bytes(2, "big")
    head[frame + 7 : frame + 9] = (min(right * wide, whole_width) - x * wide).to_bytes(2, "big")
    part = bytearray().join([head, *map(data.__getitem__, map(slice, starts, ends[:, right - 1].tolist()))])
    stream, marks = np.frombuffer(part, np.uint8), lengths[y:bottom, x:right].cumsum() + (len(head) - 1)
    stream[marks] = RESTARTS[: len(marks)]  # counted from the first MCU of the part
    stream[-1] = EOI
    return part, y * high, x * wide
