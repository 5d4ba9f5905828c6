"""WebDataset shards: plain tar files of `00000042.jpg` and `00000042.cls`, which DALI, webdataset and tar can all read."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from pathlib import Path

from fastrobust.data.prepared import records

SHARD = 1 << 30  # bytes after which the next shard is begun


class ShardWriter:
    """Writes `stem`-000.tar, …, each first as .partial. `shard`: bytes in a shard, about."""

    def __init__(self, stem: Path, count: int, shard: int = SHARD):
        self.stem, self.shard, self.done = stem, shard, 0
        self.paths: list[Path] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, label: int, height: int, width: int, raw: bool, data: bytes) -> tuple[int, int, bytes]:
        """(the number of the file, the offset and the bytes there) of an image stored as bare pixels or JPEG."""
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
        self.done += 1
        return len(self.paths) - 1, offset, data

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
        return self.paths

    def abandon(self) -> None:
        self._end_shard()


read = partial(records.read, "webdataset")
