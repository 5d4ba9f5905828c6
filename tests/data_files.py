"""Data sets made up for tests, as files; and the real ones, where they are."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrobust.__main__ import parse
from fastrobust.config.datasets import DATASETS
from fastrobust.data import formats, sets
from fastrobust.data.loaders.ffcv import functions
from fastrobust.data.prepared import writing
from fastrobust.runtime.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
CIFAR = DATASETS["cifar10"].classes


def real(*parts: str) -> Path:
    """A path below $FASTROBUST_DATA; the test is skipped where that is absent."""
    path = Path(os.environ.get("FASTROBUST_DATA") or "absent", *parts)
    if not path.exists():
        pytest.skip(f"needs the real data {'/'.join(parts)} in $FASTROBUST_DATA")
    return path


def fashion_mnist() -> str:
    """The folder of Fashion-MNIST; the test is skipped where there is none."""
    try:
        return str(sets.locate("fashion_mnist"))
    except DataError:
        pytest.skip("needs Fashion-MNIST")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder: Path, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """The four MNIST files with random pixels, the train files gzipped; returns the train arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (count, 28, 28), np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in zip(sets._IDX_NAMES["train"], (images, labels), strict=True):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    for name, array in zip(sets._IDX_NAMES["test"], (images[:10], labels[:10]), strict=True):
        (folder / name).write_bytes(idx(array))
    return images, labels


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def png16(size: int = 32) -> bytes:
    """A PNG file with 16 bits of red, green and blue, which Pillow reads and does not write."""
    rows = b"".join(b"\0" + RNG.bytes(6 * size) for _ in range(size))
    parts = {b"IHDR": struct.pack(">2I5B", size, size, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def noise_png(size: int = 32) -> bytes:
    return png(RNG.integers(0, 256, (size, size, 3), np.uint8))


def image_set(classes=("cat", "dog"), count=3, size=32, folders=("train", "val")) -> dict[str, bytes]:
    """Member names and PNG bytes of an image set, in no particular order."""
    names = [f"{folder}/{name}/{i}.png" for i in range(count) for folder in folders for name in classes]
    return {name: noise_png(size) for name in names}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def cifar_batches(count: int = 4) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    """Batch files as the official ones are (protocol 2), and (pixels N x 32 x 32 x 3, labels) for each."""
    files, truth = {}, {}
    for name in [*formats.CIFAR_BATCHES["train"], "test_batch"]:
        pixels = RNG.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = RNG.integers(0, 10, count).tolist()
        planar = np.stack([pixels[..., channel].reshape(count, 1024) for channel in range(3)], 1)
        files[name] = pickle.dumps({"data": planar.reshape(count, 3072), "labels": labels}, protocol=2)
        truth[name] = pixels, labels
    return files, truth


def pixels_of(result) -> np.ndarray:
    return result.images.permute(0, 2, 3, 1).numpy()


def check_form(result, count, channels, size, classes):
    assert result.images.shape == (count, channels, size, size) and result.images.dtype == torch.uint8
    assert result.images.is_contiguous(memory_format=torch.channels_last)
    assert result.images.permute(0, 2, 3, 1).is_contiguous()
    assert result.labels.shape == (count,) and result.labels.dtype == torch.int64
    assert result.classes == tuple(classes)


def prepare(kind: str, argv: list[str]) -> int:
    """The prepare command; what goes wrong is raised. kind: ffcv, dali, or webdataset, which is dali's."""
    return writing.command(parse(["prepare", {"webdataset": "dali"}.get(kind, kind), *map(str, argv)]))


def need(loader: str) -> None:
    """The test is skipped where this loader cannot run."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
        pytest.importorskip("numba")
    if loader == "ffcv":
        try:
            functions()
        except ConfigError as error:
            pytest.skip(str(error))
