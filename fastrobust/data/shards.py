"""WebDataset shards: plain tar files of `00000042.jpg` and `00000042.cls`, which DALI, webdataset and tar can all read, and
one index of where every image lies, so that any image can be had at any time."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from fastrobust.data.records import Records, read_manifest
from fastrobust.errors import DataError

SHARD = 1 << 30  # bytes after which the next shard is begun
ROW = np.dtype([(name, "<i8") for name in ("file", "offset", "length", "height", "width", "raw", "label")])


class ShardWriter:
    """Writes `stem`-000.tar, … (each first as .partial) and `stem`.index.npy. `shard`: bytes in a shard, about."""

    def __init__(self, stem: Path, count: int, shard: int = SHARD):
        self.stem, self.shard, self.rows, self.done = stem, shard, np.zeros(count, ROW), 0
        self.paths: list[Path] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, label: int, height: int, width: int, raw: bool, data: bytes) -> None:
        if self.tar is None or self.tar.offset >= self.shard:
            self._end_shard()
            path = self.stem.with_name(f"{self.stem.name}-{len(self.paths):03}.tar.partial")
            self.paths.append(path)
            self.tar = tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by _end_shard)
        if raw:
            data = b"P6\n%d %d\n255\n" % (width, height) + data
        name = f"{self.done:08}"
        offset = self._member(f"{name}.{'ppm' if raw else 'jpg'}", data)
        self._member(f"{name}.cls", str(label).encode())
        self.rows[self.done] = (len(self.paths) - 1, offset, len(data), height, width, raw, label)
        self.done += 1

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))
        return self.tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def _end_shard(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.tar = None

    def close(self) -> list[Path]:
        self._end_shard()
        index = self.stem.with_name(f"{self.stem.name}.index.npy.partial")
        with open(index, "wb") as file:
            np.save(file, self.rows[: self.done])
        self.paths.append(index)
        return self.paths

    def abandon(self) -> None:
        self._end_shard()
        for path in self.paths:
            path.unlink(missing_ok=True)


def read(folder: Path, split: str, size) -> Records:
    """What a manifest and its index say about a split. Raises DataError."""
    manifest = read_manifest(folder, split, size)
    if manifest["kind"] != "webdataset":
        raise DataError(f"{folder} holds {manifest['kind']} files, not shards: write them with data_prep/write_dali.py")
    *shards, index = (folder / file["name"] for file in manifest["files"])
    try:
        rows = np.load(index, allow_pickle=False)
        if rows.dtype != ROW or len(rows) != manifest["count"]:
            raise ValueError("it does not belong to the manifest")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{index} is damaged ({error}): write it again") from None
    columns = {name: np.ascontiguousarray(rows[name]) for name in ROW.names}
    columns["raw"] = columns["raw"].astype(bool)
    return Records(tuple(shards), **columns, classes=tuple(manifest["classes"]), manifest=manifest)
