"""FFCV's file format: header, fields, a table of samples, pages of data, a table of allocations. Needs no FFCV.

FFCV's own DatasetWriter orders its pages by the luck of its workers, draws at random what is stored raw, and waits for
ever when a worker dies. This writer takes encoded images one after the other, so that the same images give the same bytes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from fastrobust.data.prepared import records
from fastrobust.runtime.errors import DataError

VERSION = 2
PAGE = 1 << 24  # bytes; no image spans two pages
INT, RGB_IMAGE = 1, 2  # FFCV's field types
JPEG, RAW = 0, 1  # and its image modes
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])


class BetonWriter:
    """Writes `path`, with fields `image` and `label`, for at most `count` images."""

    def __init__(self, path: Path, count: int):
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115 (closed by close or abandon)
        self.samples = np.zeros(count, SAMPLE)
        self.sizes = np.zeros(count, "<u8")
        self.done = 0
        start = HEADER.itemsize + 2 * FIELD.itemsize + self.samples.nbytes
        self.position = -(-start // PAGE) * PAGE
        self.file.seek(self.position)

    def add(self, label: int, height: int, width: int, raw: bool, data: bytes) -> tuple[int, int, bytes]:
        """(the number of the file, the offset and the bytes there) of an image stored as bare pixels or JPEG."""
        if len(data) > PAGE:
            raise DataError(f"it takes {len(data)} bytes, more than FFCV's page of {PAGE}: set --cap, or --storage jpeg")
        if self.position % PAGE + len(data) > PAGE:
            self.position = -(-self.position // PAGE) * PAGE
            self.file.seek(self.position)
        self.samples[self.done] = ((RAW if raw else JPEG, width, height, self.position), label)
        self.sizes[self.done] = len(data)
        self.file.write(data)
        offset, self.position = self.position, self.position + len(data)
        self.done += 1
        return 0, offset, data

    def close(self) -> list[Path]:
        samples = self.samples[: self.done]
        allocations = np.zeros(self.done, ALLOCATION)
        allocations["sample"], allocations["size"] = np.arange(self.done), self.sizes[: self.done]
        allocations["pointer"] = samples["image"]["pointer"]
        self.file.write(allocations.tobytes())
        self.file.seek(0)
        self.file.write(np.array([(VERSION, 2, PAGE, self.done, self.position)], HEADER).tobytes())
        fields = np.zeros(2, FIELD)
        for field, kind, name in zip(fields, (RGB_IMAGE, INT), (b"image", b"label"), strict=True):
            field["type"] = kind
            field["name"][: len(name)] = np.frombuffer(name, "<u1")
        self.file.write(fields.tobytes() + samples.tobytes())
        self.file.close()
        return [self.path]

    def abandon(self) -> None:
        self.file.close()


read = partial(records.read, "ffcv")
