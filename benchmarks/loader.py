"""Images/s and CPU use of every loader, resolution and format, against torchvision's DataLoader at equal work.

    python -m benchmarks.loader --quick
    python -m benchmarks.loader --data /data/imagenet --limit 5000 --json benchmarks/results/loader.json

Equal work: the same JPEGs of the same stored size (quality 90), a random-resized crop and a flip, and out come uint8 batches
on the device. The comparator is torchvision's ImageFolder, RandomResizedCrop and RandomHorizontalFlip in torch's DataLoader.
Without --data the images are real ones if FASTROBUST_DATA holds imagenet-samples, else generated; the table says which.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import measure
from fastrobust.config.sections import Augment
from fastrobust.data import loaders, sets
from fastrobust.data.loaders.dali import Dali
from fastrobust.data.loaders.ffcv import Ffcv
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.data.prepared import beton, shards, writing
from fastrobust.runtime import distributed
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.limits import cores
from fastrobust.runtime.torchvision_compat import import_torchvision

PHASES = [(160, 128), (352, 224), ("original", 288)]  # stored size, crop
AUGMENT = Augment(crop="random_resized", flip=True)


def sample_images(limit: int) -> tuple[list[bytes], str]:
    """(up to `limit` image files, what they are)."""
    archive = Path(os.environ.get("FASTROBUST_DATA") or "absent", "imagenet-samples", "imagenet_samples.tar")
    images: list[bytes] = []
    if archive.exists():
        with tarfile.open(archive) as tar:
            images = [tar.extractfile(member).read() for member in tar.getmembers()[:limit] if member.isfile()]
    for i in range(0 if images else limit):
        noise = np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images, "ImageNet samples" if archive.exists() else "generated images of 500 x 375"


def samples(folder: Path, limit: int) -> tuple[Path, str]:
    """(an image folder, what is in it)."""
    images, what = sample_images(limit)
    for i, image in enumerate(images):
        for split in ("train", "val"):
            file = folder / split / f"{i % 10}" / f"{i:05}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            if split == "train" or i < 10:
                file.write_bytes(image)
    return folder, what


def write(source: Path | str, folder: Path, limit: int | None) -> None:
    """All sizes as jpeg and raw .beton files, JPEG shards, and folders of the same JPEGs for torchvision."""
    options = Namespace(
        dataset="image_folder",
        limit=limit,
        cap=None,
        quality=90,
        skip_corrupt=False,
        overwrite=False,
        workers=os.cpu_count(),
    )
    pictures = sets.pictures("image_folder", "train", source, limit)
    for kind, storage in (("ffcv", "jpeg"), ("ffcv", "raw"), ("webdataset", "jpeg")):
        place = Namespace(**vars(options), storage=storage, output=folder / f"{kind}-{storage}")
        writing.write_split(kind, "train", pictures, tuple(size for size, _ in PHASES), place)
    for size, _ in PHASES:
        found = shards.read(folder / "webdataset-jpeg", "train", size)
        descriptors = found.open()
        for i in range(len(found)):
            file = folder / f"folder-{size}" / f"{found.label[i]:04}" / f"{i:08}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(found.read(descriptors, i))
        for descriptor in descriptors:
            os.close(descriptor)


def torchvision_loader(folder: Path, resolution: int, batch_size: int, workers: int, device: torch.device):
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    steps = [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    data = torchvision.datasets.ImageFolder(str(folder), transforms.Compose(steps))
    options = {"num_workers": workers, "pin_memory": device.type == "cuda", "drop_last": True}
    batches = torch.utils.data.DataLoader(data, batch_size, shuffle=True, **options)

    def one_pass(count: int) -> None:
        for _, (x, y) in zip(range(count), batches, strict=False):
            x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            y.to(device, non_blocking=True)

    return one_pass


def rows_of(folder: Path, size, resolution: int, batch_size: int, workers: int, device: torch.device) -> dict:
    """name -> function of a number of batches."""
    facts = (size, 3, resolution, AUGMENT, device, workers)
    jpeg, raw, tars = (folder / name for name in ("ffcv-jpeg", "ffcv-raw", "webdataset-jpeg"))
    made = {"torch shards jpeg": Torch(shards.read(tars, "train", size), *facts)}
    if loaders.installed("ffcv"):
        made["ffcv jpeg"] = Ffcv(beton.read(jpeg, "train", size), *facts)
        made["ffcv raw"] = Ffcv(beton.read(raw, "train", size), *facts)
    if loaders.installed("nvidia.dali"):
        made[f"dali jpeg {'mixed' if device.type == 'cuda' else 'cpu'}"] = Dali(shards.read(tars, "train", size), *facts)

    def one_pass(loader):
        def run(count: int) -> None:
            for _ in loader.batches(0, 0, batch_size, 0, count):
                pass

        return run

    rows = {name: one_pass(loader) for name, loader in made.items()}
    rows["DataLoader"] = torchvision_loader(folder / f"folder-{size}", resolution, batch_size, workers, device)
    return rows


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main() -> int:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--data", metavar="PATH", help="an image folder, or tars of one")
    p.add_argument("--limit", type=int, help="images (default 500, with --quick 160)")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--workers", type=int, default=cores())
    p.add_argument("--repetitions", type=int, help="default 5, with --quick 3")
    return main_with_errors(lambda: run(p.parse_args()))


def run(arguments: Namespace) -> int:
    device = distributed.pick_device(arguments.device)
    limit = arguments.limit or (160 if arguments.quick else 500)
    if limit < arguments.batch_size:
        raise ConfigError(f"--limit must be at least the batch size of {arguments.batch_size}")
    repetitions = arguments.repetitions or (3 if arguments.quick else 5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, what = (arguments.data, arguments.data) if arguments.data else samples(folder / "source", limit)
        write(source, folder, limit)
        count = min(limit, len(beton.read(folder / "ffcv-jpeg", "train", 160))) // arguments.batch_size
        images = count * arguments.batch_size
        result: dict = {"images": images, "of": what, "batch_size": arguments.batch_size, "workers": arguments.workers}
        table, result["rows"] = [], {}
        for size, resolution in PHASES:
            rows = rows_of(folder, size, resolution, arguments.batch_size, arguments.workers, device)
            used: dict[str, list[float]] = {name: [] for name in rows}

            def timed(name, call, used=used):
                began, before = time.perf_counter(), cpu_seconds()
                call(count)
                used[name].append((cpu_seconds() - before) / (time.perf_counter() - began))

            calls = {name: lambda name=name, call=call: timed(name, call) for name, call in rows.items()}
            times = measure.interleaved(calls, device, repetitions=repetitions)
            for name, t in times.items():
                s, busy = measure.summary(t), sum(used[name][1:]) / repetitions
                ratio = measure.ratio(times["DataLoader"], t)
                rate = {"median": images / s["median"], "min": images / s["max"], "max": images / s["min"]}
                result["rows"][f"{size} to {resolution}, {name}"] = rate | {"over_DataLoader": ratio, "cores": busy}
                cells = [f"{size} → {resolution}", name, f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"]
                table.append([*cells, f"{ratio:.2f}", f"{busy:.2f}", f"{rate['median'] / max(busy, 1e-9):,.0f}"])
        columns = ["size", "loader", "images/s, median (min to max)", "× DataLoader", "cores busy", "images/s a core"]
        measure.report(f"loader, {what}", columns, table, result, arguments.json, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
