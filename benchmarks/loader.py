"""Images/s, CPU use and the wait for the first batch of every loader, at each stored size, beside those of others.

    python -m benchmarks.loader --quick
    python -m benchmarks.loader --data /data/imagenet --limit 5000 --json benchmarks/results/loader.json

Equal work: the same pixels as JPEGs of quality 90, a random-resized crop and a flip or, as an evaluation has them, the
squares in the images' middles; out come uint8 batches on the device.
Ours are compared with FFCV's own Loader, DALI's own pipeline and torch's DataLoader with several decoders (loader_rows.py).
Without --data the images are real ones if FASTROBUST_DATA holds imagenet-samples, else generated; the table says which.
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import loader_rows, measure
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

COMPARED = ("DataLoader", "FFCV's Loader")
AUGMENT = Augment(crop="random_resized", flip=True)
PHASES = [(160, 128, AUGMENT), (352, 224, AUGMENT), ("original", 288, AUGMENT), ("original", 288, None)]  # stored size, crop
SIZES = (160, 352, "original")


def sample_images(limit: int) -> tuple[list[bytes], str]:
    """(`limit` image files, what they are): there may be fewer, which come several times then."""
    archive = Path(os.environ.get("FASTROBUST_DATA") or "absent", "imagenet-samples", "imagenet_samples.tar")
    images: list[bytes] = []
    if archive.exists():
        with tarfile.open(archive) as tar:
            images = [tar.extractfile(member).read() for member in tar.getmembers()[:limit] if member.isfile()]
        found = f"{len(images)} ImageNet samples"
        return list(itertools.islice(itertools.cycle(images), limit)), found
    for i in range(limit):
        noise = np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images, "generated images of 500 x 375"


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
    """All sizes as jpeg and raw .beton files and JPEG shards, and what others read."""
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
        writing.write_split(kind, "train", pictures, SIZES, place)
    loader_rows.write_plain(folder / "ffcv-raw", folder / "plain", SIZES)


def rows_of(folder: Path, size, resolution: int, augment, batch_size: int, workers: int, device: torch.device, count: int):
    """(name -> a function that takes `count` batches, name -> seconds from the loader's making to its first batch, name ->
    why a loader is left out). Every loader has had a pass."""
    facts = (size, 3, resolution, augment, device, workers)
    jpeg, raw, tars = (folder / name for name in ("ffcv-jpeg", "ffcv-raw", "webdataset-jpeg"))

    def ours(kind, read, place):
        loader, epochs = kind(read(place, "train", size), *facts), itertools.count()
        return lambda count: loader.batches(0, next(epochs), batch_size, 0, count)

    making = {"torch shards jpeg": lambda: ours(Torch, shards.read, tars)}
    if loaders.available("ffcv"):
        making |= {"ffcv jpeg": lambda: ours(Ffcv, beton.read, jpeg), "ffcv raw": lambda: ours(Ffcv, beton.read, raw)}
    if loaders.available("dali"):
        making[f"dali jpeg {'mixed' if device.type == 'cuda' else 'cpu'}"] = lambda: ours(Dali, shards.read, tars)
    for name, make in loader_rows.OTHERS.items():
        making[name] = partial(make, folder, size, resolution, batch_size, workers, device, augment is None)
    rows, first, absent = {}, {}, {}
    for name, make in making.items():
        began = time.perf_counter()
        try:
            take = make()
            for _ in take(count):
                first.setdefault(name, time.perf_counter() - began)
            rows[name] = lambda take=take: deque(take(count), 0)
        except ImportError as error:
            absent[name] = str(error)
            print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
    return rows, first, absent


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> int:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--data", metavar="PATH", help="an image folder, or tars of one")
    p.add_argument("--limit", type=int, help="images (default 1000, with --quick 160)")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--workers", type=int, default=cores())
    p.add_argument("--repetitions", type=int, help="default 5, with --quick 3")
    return main_with_errors(lambda: run(p.parse_args()))


def run(arguments: Namespace) -> int:
    device = distributed.pick_device(arguments.device)
    limit = arguments.limit or (160 if arguments.quick else 1000)
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
        for size, resolution, augment in PHASES:
            phase = f"{size} → {resolution}" + ("" if augment else ", middle")
            facts = arguments.batch_size, arguments.workers, device, count
            rows, first, absent = rows_of(folder, size, resolution, augment, *facts)
            result["left_out"] = absent
            used: dict[str, list[float]] = {name: [] for name in rows}

            def timed(name, call, used=used):
                began, before = time.perf_counter(), cpu_seconds()
                call()
                used[name].append((cpu_seconds() - before) / (time.perf_counter() - began))

            calls = {name: lambda name=name, call=call: timed(name, call) for name, call in rows.items()}
            times = measure.interleaved(calls, device, repetitions=repetitions, warm_up=0)
            for name, t in times.items():
                s, busy = measure.summary(t), statistics.median(used[name])
                rate = {"median": images / s["median"], "min": images / s["max"], "max": images / s["min"]}
                ratios = {f"over_{other}": measure.ratio(times[other], t) for other in COMPARED if other in times}
                per_core = images / statistics.median(a * b for a, b in zip(t, used[name], strict=True))
                facts = {"cores": busy, "a_core": per_core, "first_batch": first[name]}
                result["rows"][f"{phase.replace('→', 'to')}, {name}"] = rate | ratios | facts
                cells = [phase, name, f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"]
                cells += [f"{ratios[f'over_{other}']:.2f}" if other in times else "" for other in COMPARED]
                table.append([*cells, f"{busy:.2f}", f"{per_core:,.0f}", f"{first[name]:.1f}"])
            for name, why in absent.items():
                table.append([phase, name, f"left out: {why[:60]}", *5 * [""]])
        columns = ["size", "loader", "images/s, median (min to max)", *(f"× {other}" for other in COMPARED)]
        columns += ["cores busy", "images/s a core", "first batch, s"]
        measure.report(f"loader, {what}", columns, table, result, arguments.json, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
