"""Prepared images on disk, in files that a loader reads fast: what a reader needs to know, and the manifest beside them.

    train_160.json        manifest: how many images, of which sizes and classes, in which files with which checksums
    train_160.index.npy   where every image lies, and its checksum
    train_160.beton       FFCV's format (beton.py)              written by `fastrobust prepare ffcv`
    train_160-000.tar     or WebDataset shards (shards.py)      written by `fastrobust prepare dali`

The manifest is written last: files without one are not whole. It has a checksum of itself and one of each file. The index is
checked when it is read, and every image whenever it is read: a changed byte is never trained on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastrobust.data import sets
from fastrobust.data.formats import Member
from fastrobust.runtime.errors import DataError

MANIFEST_FORMAT = 3  # since then parts of a JPEG can be decoded alone (regions.py)
ROW = np.dtype([(name, "<i8") for name in ("file", "offset", "length", "height", "width", "raw", "label", "crc")])
MAKERS = {"ffcv": "fastrobust prepare ffcv", "webdataset": "fastrobust prepare dali"}  # what writes each kind of files
Size = int | str  # the short side in pixels, or "original"


@dataclass(frozen=True)
class Records:
    """Where the images of a split lie, one entry each in arrays of length N: which of `files`, the offset and the number
    of bytes there, the image's height and width in pixels, whether it is stored as bare pixels, its label, and the CRC-32 of
    the bytes, or -1 where the file has none: then `members` are the images, to be looked at before they are used."""

    files: tuple[Path, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    height: np.ndarray
    width: np.ndarray
    raw: np.ndarray
    label: np.ndarray
    crc: np.ndarray
    classes: tuple[str, ...]
    manifest: dict[str, Any]
    members: list[Member] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, keep: np.ndarray) -> Records:
        """The records with these numbers."""
        arrays = {name: getattr(self, name)[keep] for name in ROW.names}
        members = self.members and [self.members[i] for i in keep]
        return replace(self, **arrays, members=members)

    def without(self, numbers: Collection[int]) -> Records:
        """The same without the images that have these numbers."""
        return self.take(np.array([i for i in range(len(self)) if i not in numbers]))

    @property
    def labels(self) -> np.ndarray:
        return self.label

    @property
    def source(self) -> str:
        return str(self.files[0])

    def checksum(self) -> str:
        """SHA-256 of the files' checksums in the manifest, of the labels and of which images were taken."""
        digest = hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode())
        for array in (self.file, self.offset, self.label):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def open(self) -> list[int]:
        """A file descriptor for each of `files`, for `read_exactly`."""
        return [os.open(file, os.O_RDONLY) for file in self.files]

    def read(self, descriptors: list[int], i: int) -> bytes:
        """The stored bytes of image i. Raises DataError where they are not those that were written."""
        file = int(self.file[i])
        data = os.pread(descriptors[file], int(self.length[i]), int(self.offset[i]))
        if len(data) != self.length[i]:
            raise cut_short(self.files[file], i)
        if self.crc[i] >= 0 and zlib.crc32(data) != self.crc[i]:
            raise DataError(f"image {i} in {self.files[file]} is damaged (its checksum differs): write the file again")
        return data


def cut_short(file: Path, i: int) -> DataError:
    return DataError(f"{file} ends within image {i}: it was cut short; write it again")


def stored_size(width: int, height: int, size: Size, cap: int | None) -> tuple[int, int]:
    """(width, height) as stored: the short side is at most `size` (or `cap`), and nothing is enlarged."""
    limit = cap if size == "original" else size
    short = min(width, height)
    if limit is None or short <= limit:
        return width, height
    return max(limit, round(width * limit / short)), max(limit, round(height * limit / short))


def read(kind: str, folder: Path, split: str, size: Size) -> Records:
    """What a manifest and its index say about a split. Raises DataError."""
    manifest = read_manifest(folder, split, size)
    if manifest["kind"] != kind:
        raise DataError(f"{folder} holds {manifest['kind']} files, not {kind}: write them with `{MAKERS[kind]}`")
    files = tuple(folder / file["name"] for file in manifest["files"])
    try:
        content = files[-1].read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["files"][-1]["sha256"]:
            raise ValueError("its checksum differs from the manifest")
        rows = np.load(io.BytesIO(content), allow_pickle=False)
        check_rows(rows, manifest)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{files[-1]} is damaged ({error}): write it again") from None
    columns = {name: np.ascontiguousarray(rows[name]) for name in ROW.names}
    columns["raw"] = columns["raw"].astype(bool)
    return Records(files[:-1], **columns, classes=tuple(manifest["classes"]), manifest=manifest)


def check_rows(rows: np.ndarray, manifest: dict[str, Any]) -> None:
    """Raise ValueError unless every image lies within its file and has as many bytes as native code will read."""
    if rows.dtype != ROW or rows.shape != (manifest["count"],) or not len(rows):
        raise ValueError("it does not belong to the manifest")
    sizes = np.array([file["bytes"] for file in manifest["files"][:-1]])
    if any(rows[name].min() < 0 for name in ROW.names) or rows["file"].max() >= len(sizes):
        raise ValueError("a number in it is out of range")
    if (rows["offset"] > sizes[rows["file"]]).any() or (rows["length"] > (sizes[rows["file"]] - rows["offset"])).any():
        raise ValueError("an image lies outside its file")
    height, width = rows["height"], rows["width"]
    if min(height.min(), width.min()) < 1 or max(height.max(), width.max()) > 65535:
        raise ValueError("the size of an image is out of range")
    if rows["label"].max() >= len(manifest["classes"]):
        raise ValueError("a label has no class")
    if (rows["length"] < 3 * height * width)[rows["raw"] != 0].any():
        raise ValueError("bare pixels are too few for their image")


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of everything else in it."""
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    return facts | {"sha256": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}


def manifest_path(folder: Path, split: str, size: Size) -> Path:
    return folder / f"{split}_{size}.json"


def file_facts(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


def _sha256(stream) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path, split: str, size: Size) -> dict[str, Any]:
    """The manifest, with every file that it lists there in its full length. Raises DataError."""
    path = manifest_path(folder, split, size)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] not in (2, MANIFEST_FORMAT):
            raise ValueError(f"format {manifest['format']} is not known")
        if manifest != seal(manifest):
            raise ValueError("its checksum differs")
        files = [(folder / file["name"], file["bytes"]) for file in manifest["files"]]
        manifest["kind"], manifest["classes"], manifest["count"]
    except FileNotFoundError:
        there = sorted(p.name for p in folder.glob("*.json")) if folder.is_dir() else []
        found = f"there are {', '.join(there)}" if there else f"{folder} holds no prepared images"
        how = " or ".join(f"`{maker}`" for maker in MAKERS.values())
        raise DataError(f"{path} does not exist ({found}): write the images with {how}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): write the images again") from None
    for file, length in files:
        found = file.stat().st_size if file.is_file() else None
        if found != length:
            state = "is missing" if found is None else f"has {found} bytes instead of {length}"
            raise DataError(f"{file} {state}: write it again")
    return manifest


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise DataError unless every file of a manifest has the checksum that it had when it was written."""
    for file in manifest["files"]:
        if file_facts(folder / file["name"])["sha256"] != file["sha256"]:
            raise DataError(f"{folder / file['name']} is damaged (its checksum differs from the manifest): write it again")


def prepared_folder(dataset: str, kind: str) -> Path:
    """Where the prepared files of a data set are looked for."""
    return sets.data_root(None) / f"{dataset}-{'ffcv' if kind == 'ffcv' else 'dali'}"
