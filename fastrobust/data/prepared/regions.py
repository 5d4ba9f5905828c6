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
PLACE = 20  # of the segment: behind SOI and JFIF's, which has no other length without a thumbnail
NUMBERS = PLACE + 4 + len(SIGN)  # where the frame header and the coded pixels begin behind the segment, then the lengths
MOST = (65535 - 2 - len(SIGN)) // 2 - 2  # MCUs whose lengths fit into a segment: 8 megapixels
RESTARTS = (0xD0 + np.arange(MOST) % 8).astype(np.uint8)


def encode(image: Image.Image, quality: int) -> bytes:
    """The RGB image as a JPEG whose parts can be decoded alone; a plain one if it is too large for that."""
    if -(-image.width // 16) * -(-image.height // 16) > MOST:
        return _saved(image, quality=quality)
    data = _saved(image, quality=quality, restart_marker_blocks=1)
    frame, scan = _header(data)
    stream = np.frombuffer(data, np.uint8)
    after = np.flatnonzero(stream[scan:-1] == 255) + scan + 1
    ends = after[stream[after] >= RESTARTS[0]] + 1  # of each MCU and its marker; a 255 within an MCU has a 0 behind it
    numbers = np.concatenate(([frame - PLACE, scan - PLACE], np.diff(ends, prepend=scan))).astype("<u2").tobytes()
    segment = bytes((255, APP9)) + (2 + len(SIGN) + len(numbers)).to_bytes(2, "big") + SIGN + numbers
    return data[:PLACE] + segment + data[PLACE:]


def _saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _header(data: bytes) -> tuple[int, int]:
    """Where the frame header and the coded pixels of a JPEG are."""
    frame, place, kind = 0, PLACE, 0
    while kind != SOS:
        kind = data[place + 1]
        frame = place if kind == SOF0 else frame
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return frame, place


def cut(data: bytes, top: int, left: int, height: int, width: int) -> tuple[bytes | bytearray, int, int]:
    """(a JPEG that holds the box, the row and the column of the image at which it begins): the smallest that there is, or
    the image itself where `encode` did not make it so."""
    if data[PLACE + 4 : NUMBERS] != SIGN:
        return data, 0, 0
    end = PLACE + 2 + (data[PLACE + 2] << 8 | data[PLACE + 3])
    numbers = np.frombuffer(data, "<u2", (end - NUMBERS) // 2, NUMBERS)
    frame, scan = end + int(numbers[0]), end + int(numbers[1])
    whole_height, whole_width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    high, wide = (data[frame + 11] & 15) * 8, (data[frame + 11] >> 4) * 8  # of an MCU
    rows, columns = -(-whole_height // high), -(-whole_width // wide)
    y, bottom = max(top - 1, 0) // high, min((top + height) // high + 1, rows)
    x, right = max(left - 1, 0) // wide, min((left + width) // wide + 1, columns)
    places = numbers[1 : 2 + bottom * columns].cumsum(dtype=np.int64) + end  # where MCU 0, 1, … begin
    starts, stops = (places[y * columns + column :: columns].tolist() for column in (x, right))
    head = bytearray(data[:PLACE] + data[end:scan])
    sizes = min(bottom * high, whole_height) - y * high, min(right * wide, whole_width) - x * wide
    head[frame - end + PLACE + 5 : frame - end + PLACE + 9] = sizes[0].to_bytes(2, "big") + sizes[1].to_bytes(2, "big")
    part = bytearray().join([head, *map(data.__getitem__, map(slice, starts, stops))])
    marks = numbers[2:].reshape(rows, columns)[y:bottom, x:right].cumsum(dtype=np.int64) + (len(head) - 1)
    stream = np.frombuffer(part, np.uint8)
    stream[marks] = RESTARTS[: len(marks)]  # counted from the first MCU of the part
    stream[-1] = EOI
    return part, y * high, x * wide
