"""Writing prepared images in both formats, and reading them back one by one."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from data_files import prepare
from PIL import Image, ImageOps

from fastrobust.data.prepared import beton, records, shards

KINDS = {"ffcv": beton.read, "webdataset": shards.read}
KINDS_FILES = {"ffcv": "train_original.beton", "webdataset": "train_original-000.tar"}
both = pytest.mark.parametrize("kind", KINDS)


def write(kind: str, source: Path, output: Path, *arguments: str) -> Path:
    assert prepare(kind, ["image_folder", "--data", str(source), "--output", str(output), *arguments]) == 0
    return output


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def upright(file: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


def pixels(found: records.Records, i: int) -> np.ndarray:
    """Image i as H x W x 3, its size checked."""
    descriptors = found.open()
    try:
        data = found.read(descriptors, i)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    shape = (found.height[i], found.width[i], 3)
    if found.raw[i] and found.manifest["kind"] == "ffcv":
        return np.frombuffer(data, np.uint8).reshape(shape)
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == shape
    return image
