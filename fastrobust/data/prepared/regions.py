"""JPEGs of which a part can be decoded alone, by any decoder.

A restart marker follows every MCU, the block of 16 x 16 pixels that a JPEG is made of, so that no MCU needs those before it.
A segment that decoders skip holds their lengths. The MCUs that a box touches, behind the same header with another height and
width, are a valid JPEG: loaders/cut.py makes it. What is in the box has the same pixels as in the whole image.
The markers add 5 % to a file, the lengths 2.5 %.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SOF0, RESTART, EOI, SOS, APP9 = 0xC0, 0xD0, 0xD9, 0xDA, 0xE9  # RESTART: the first of eight
SIGN = b"MCU lengths\0"
PLACE = 20  # of the segment: behind SOI and JFIF's, which has no other length without a thumbnail
NUMBERS = PLACE + 4 + len(SIGN)  # where the frame header and the coded pixels begin behind the segment, then the lengths
MOST = (65535 - 2 - len(SIGN)) // 2 - 2  # MCUs whose lengths fit into a segment: 8 megapixels


def encode(image: Image.Image, quality: int) -> bytes:
    """The RGB image as a JPEG whose parts can be decoded alone; a plain one if it is too large for that."""
    if -(-image.width // 16) * -(-image.height // 16) > MOST:
        return _saved(image, quality=quality)
    data = _saved(image, quality=quality, restart_marker_blocks=1)
    frame, scan = _header(data)
    stream = np.frombuffer(data, np.uint8)
    after = np.flatnonzero(stream[scan:-1] == 255) + scan + 1
    ends = after[stream[after] >= RESTART] + 1  # of each MCU and its marker; a 255 within an MCU has a 0 behind it
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
