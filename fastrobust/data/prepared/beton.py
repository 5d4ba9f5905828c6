"""FFCV's file format: header, fields, a table of samples, pages of data, a table of allocations. Needs no FFCV.

FFCV's own DatasetWriter orders its pages by the luck of its workers, draws at random what is stored raw, and waits for
ever when a worker dies. This writer takes encoded images one after the other, so that the same images give the same bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fastrobust.data import packed, sets
from fastrobust.data.packed import ALLOCATION, FIELD, HEADER, IMAGE, INT, RAW, RGB_IMAGE, VERSION
from fastrobust.data.prepared import records
from fastrobust.data.prepared.records import Records, Size
from fastrobust.runtime.errors import DataError

PAGE = 1 << 24  # bytes; no image spans two pages
JPEG = 0  # one of FFCV's image modes
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)


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


def read(folder: Path, split: str, size: Size) -> Records:
    """What is known of a split's images: by the manifest, or, of a file that FFCV's own writer made, by its tables; that has
    one size. Raises DataError."""
    if records.manifest_path(folder, split, size).exists() or not by_ffcv(folder):
        return records.read("ffcv", folder, split, size)
    listing = sets.list_images("image_folder", split, folder)  # in the order in which the source is read
    file = Path(listing.members[0].read.args[0])
    table = packed.ffcv_table(file)
    rows = np.array([int(member.name.rpartition("/")[2].partition(".")[0]) for member in listing.members])
    columns = {name: getattr(table, name)[rows] for name in ("offset", "length", "height", "width", "raw")}
    columns |= {"file": np.zeros(len(rows), np.int64), "label": listing.labels, "crc": np.full(len(rows), -1)}
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in table)).hexdigest()
    facts = {"name": file.name, "bytes": file.stat().st_size, "tables": digest}
    manifest = {"kind": "ffcv", "dataset": None, "split": split, "limit": None, "skipped": [], "count": len(rows)}
    return Records(
        (file,), **columns, classes=listing.classes, manifest=manifest | {"files": [facts]}, members=listing.members
    )


def by_ffcv(folder: Path) -> bool:
    """Whether a folder holds files of FFCV's own writer, which have no manifest."""
    return not any(folder.glob("*_*.json")) and any(file.suffix in packed.FFCV for file in packed.files(folder))
