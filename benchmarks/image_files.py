"""What a look at image files before a run costs, and how crops on the device differ from Pillow's.

python -m benchmarks.image_files                  # images a second, of 3,000 made-up JPEGs in a temporary folder
python -m benchmarks.image_files --data PATH      # mean difference of shrunk test images, of 255
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fastrobust.data import augment, checking, formats, sets
from fastrobust.runtime import limits

FILES = 3000


def photo() -> bytes:
    """A JPEG of 500 x 375 pixels, about 90 kB: smooth colours and some noise."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    pixels = (np.asarray(smooth).astype(int) + rng.integers(-12, 12, (375, 500, 3))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def look() -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = photo()
        for i in range(FILES):
            Path(folder, f"{i}.jpg").write_bytes(content)
        members = formats.folder_members(Path(folder))
        for what, largest in (("decoded whole", FILES), ("headers and ends", 0)):
            with mock.patch.object(checking, "WHOLE", largest):
                began = time.perf_counter()
                checking.unusable(members, thorough=False)
            pace = FILES / (time.perf_counter() - began)
            print(f"{what}: {pace:,.0f} images a second, {len(content)} bytes each, {limits.cores()} cores")


def compare(path: str) -> None:
    for side, resolution in ((160, 128), (352, 224), (256, 64)):
        images = sets.load("image_folder", "test", path, resolution=side, limit=100).images
        whole = torch.tensor([[0, 0, side, side]]).expand(len(images), 4)
        with mock.patch.object(augment, "boxes", lambda draws, height, width, whole=whole: whole):
            ours = augment.random_resized_crop(augment.to_unit(images), resolution, False) * 255
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        theirs = [np.asarray(p.resize((resolution, resolution), Image.Resampling.BILINEAR)) for p in pictures]
        difference = (ours - torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)).abs().mean().item()
        print(f"{side} to {resolution} pixels: {difference:.2f} of 255")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="an image folder")
    arguments = parser.parse_args()
    compare(arguments.data) if arguments.data else look()
