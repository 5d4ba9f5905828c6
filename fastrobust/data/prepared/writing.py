"""Writing prepared images: every size in one pass over the source, the same bytes whatever the number of workers.

The commands are `fastrobust prepare ffcv` and `fastrobust prepare dali`; data_prep/ has a script for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

from fastrobust import __version__
from fastrobust.data import layouts, sets
from fastrobust.data.held_out import Choice, evenly_spaced
from fastrobust.data.prepared import records, regions
from fastrobust.data.prepared.beton import BetonWriter
from fastrobust.data.prepared.records import MANIFEST_FORMAT, Size, file_facts, manifest_path, read_manifest
from fastrobust.data.prepared.shards import ShardWriter
from fastrobust.runtime.errors import ConfigError, DataError
from fastrobust.runtime.files import write_json
from fastrobust.runtime.progress import Progress, duration

SIZES = {"imagenet": (160, 352, "original"), "imagenette": (80, 176, "original")}  # of the configs' phases
KINDS = {"ffcv": BetonWriter, "webdataset": ShardWriter}
LONGEST = 65500  # pixels of a side that Pillow writes into a JPEG
SAMPLE = 48  # images from which --dry-run judges the whole


class Picture(NamedTuple):
    """An image as it is stored: bare pixels (raw), H x W x 3, or a JPEG."""

    height: int
    width: int
    raw: bool
    data: bytes


def is_raw(storage: str, number: int) -> bool:
    """Of `mixed`, a fixed half is raw: every image's number is scattered by Knuth's multiplicative hash."""
    return storage == "raw" or (storage == "mixed" and number * 2654435761 % 2**32 < 2**31)


def encode(source: sets.Pictures, number: int, sizes: tuple[Size, ...], options: argparse.Namespace) -> list[Picture]:
    """The image in every size, each resized from the original (bicubic). Raises DataError."""
    image, pixels, pictures = source.image(number), None, []
    for size in sizes:
        shape = records.stored_size(*image.size, size, options.cap)
        if max(shape) > LONGEST:
            found = f"{source.where(number)} would be stored as {shape[0]} x {shape[1]} pixels"
            raise DataError(f"{found}, a side may have {LONGEST}: replace or remove it, or use --skip-corrupt")
        if shape == image.size:
            resized = image
        else:
            pixels = shrinkable(image) if pixels is None else pixels
            resized = shrunk(pixels, *shape)
        raw = is_raw(options.storage, number)
        data = resized.tobytes() if raw else regions.encode(resized, options.quality)
        pictures.append(Picture(resized.height, resized.width, raw, data))
    return pictures


def shrinkable(image: Image.Image) -> torch.Tensor:
    """The pixels with a fourth channel that means nothing, as Pillow has them: torch is the fastest with these."""
    pixels = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)


def shrunk(pixels: torch.Tensor, width: int, height: int) -> Image.Image:
    """By torch: Pillow's filter in a sixth of its time. Some pixels differ from Pillow's by 1 or 2."""
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return Image.frombytes("RGB", (width, height), resized.permute(0, 2, 3, 1).numpy(), "raw", "RGBX")


def in_order(work: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """work(0), work(1), … in this order, done in threads a little ahead. Pillow releases the interpreter as it works."""
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # of each
        ahead: deque = deque()
        try:
            for i in range(count):
                ahead.append(pool.submit(work, i))
                if len(ahead) > 4 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def write_split(kind: str, split: str, source: sets.Pictures, sizes: tuple[Size, ...], options: argparse.Namespace) -> None:
    """Write a split in all sizes that are not there yet. Nothing is left of it if that fails."""
    folder = Path(options.output)
    facts = {"format": MANIFEST_FORMAT, "kind": kind, "dataset": options.dataset, "split": split}
    facts |= {"storage": options.storage, "quality": options.quality, "cap": options.cap, "limit": options.limit}
    facts |= {"source": source.source, "classes": list(source.classes), "fingerprint": source.fingerprint()}
    there = {} if options.overwrite else facts | {"images": len(source.labels)}
    missing = tuple(size for size in sizes if options.overwrite or not already_there(folder, split, size, there))
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    old: list[Path] = []  # files that are replaced; until the manifest is, they are whole
    stems = []
    for size in missing:
        for left in leftovers(folder, split, size):
            print(f"{left} was left by an interrupted write: starting over", flush=True)
            left.unlink()
        in_use = files_of(folder, split, size)
        old += [folder / name for name in in_use]
        free = not any(name.startswith(f"{split}_{size}{end}") for name in in_use for end in (".beton", ".index", "-"))
        stems.append(folder / f"{split}_{size}{'' if free else '.new'}")
    writers, skipped, total = [], [], len(source.labels)
    indices = [np.zeros(total, records.ROW) for _ in missing]
    try:
        for stem in stems:
            name = stem.with_name(f"{stem.name}.beton.partial") if kind == "ffcv" else stem
            writers.append(KINDS[kind](name, total))

        def work(i: int) -> list[Picture] | DataError:
            try:
                return encode(source, i, missing, options)
            except DataError as error:
                if not options.skip_corrupt:
                    raise
                return error

        with Progress(f"{split} {' '.join(map(str, missing))}", total) as bar:
            for i, pictures in enumerate(in_order(work, total, options.workers)):
                if isinstance(pictures, DataError):
                    skipped.append(str(pictures))
                    bar.line(f"skipped: {pictures}")
                else:
                    label = int(source.labels[i])
                    for writer, picture, index in zip(writers, pictures, indices, strict=True):
                        try:
                            file, offset, data = writer.add(label, *picture)
                            shape = picture.height, picture.width, picture.raw
                            row = (file, offset, len(data), *shape, label, zlib.crc32(data))
                            index[i - len(skipped)] = row
                        except DataError as error:
                            raise DataError(f"{source.where(i)}: {error}") from None
                bar.advance(1, "" if bar.due() else None)
        count = total - len(skipped)
        if not count:
            raise DataError(f"{source.source}: not one image of {split} is usable")
        for size, stem, writer, index in zip(missing, stems, writers, indices, strict=True):
            paths = [*writer.close(), stem.with_name(f"{stem.name}.index.npy.partial")]
            with open(paths[-1], "wb") as file:
                np.save(file, index[:count])
            files = [finish(path) for path in paths]
            manifest = facts | {"size": size, "count": count, "skipped": skipped}
            manifest |= {"files": files, "fastrobust": __version__, "pillow": PIL.__version__, "torch": torch.__version__}
            write_json(manifest_path(folder, split, size), records.seal(manifest))
            length = sum(file["bytes"] for file in files)
            print(f"{manifest_path(folder, split, size)}: {count} images, {length / 1e6:,.1f} MB", flush=True)
        for file in old:
            file.unlink(missing_ok=True)
    except BaseException as error:
        for writer in writers:
            with contextlib.suppress(OSError):  # a full disk is still full
                writer.abandon()
        for size in missing:
            for left in leftovers(folder, split, size):
                left.unlink()
        # what goes wrong with the source is a DataError; a broken pipe is the terminal's
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise DataError(f"{folder} cannot be written to: {error.strerror or error}") from None
        raise


def files_of(folder: Path, split: str, size: Size) -> set[str]:
    """The names of the files that a manifest speaks of; none if there is no manifest, or a damaged one."""
    try:
        manifest = json.loads(manifest_path(folder, split, size).read_text(encoding="utf-8"))
        return {file["name"] for file in manifest["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def leftovers(folder: Path, split: str, size: Size) -> list[Path]:
    """What is there of a split in a size that no manifest speaks of: a killed process left it."""
    name, used = f"{split}_{size}", files_of(folder, split, size)
    patterns = [f"{name}[-.]*.partial", f".{name}.json.*"]
    patterns += [f"{name}{new}{end}" for new in ("", ".new") for end in (".beton", "-*.tar", ".index.npy")]
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.name not in used)


def finish(path: Path) -> dict[str, Any]:
    """Flush a .partial file to the disk, give it its name, and return what the manifest says about it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    final = path.with_name(path.name.removesuffix(".partial"))
    os.replace(path, final)
    return file_facts(final)


def already_there(folder: Path, split: str, size: Size, facts: dict[str, Any]) -> bool:
    """Whether a size was written whole with these settings. Raises ConfigError if it was with others."""
    path = manifest_path(folder, split, size)
    if not path.exists():
        return False
    try:
        manifest = read_manifest(folder, split, size)
        records.verify(folder, manifest)
    except DataError as error:
        print(f"{error}: starting over", flush=True)
        path.unlink()
        return False
    manifest["images"] = manifest["count"] + len(manifest["skipped"])
    fingerprint, facts = facts["fingerprint"], {key: value for key, value in facts.items() if key != "fingerprint"}
    odd = [f"{key} {manifest.get(key)!r} instead of {facts[key]!r}" for key in facts if manifest.get(key) != facts[key]]
    if odd:
        told = f"{path} was written with {'; '.join(odd)[:500]}"
        raise ConfigError(f"{told}: replace it with --overwrite, or choose another --output")
    if manifest.get("fingerprint", fingerprint) != fingerprint:  # older files have none
        raise ConfigError(f"{path} was written from other images: replace it with --overwrite, or choose another --output")
    print(f"{path} is there already, with the same settings: left as it is (--overwrite replaces it)", flush=True)
    return True


def estimate(split: str, source: sets.Pictures, sizes: tuple[Size, ...], options: argparse.Namespace) -> None:
    """Print what a split would take, judged from an even sample. Nothing is written."""
    numbers = evenly_spaced(len(source.labels), SAMPLE).tolist()
    began = time.perf_counter()
    pictures = list(in_order(lambda k: encode(source, numbers[k], sizes, options), len(numbers), options.workers))
    seconds = (time.perf_counter() - began) / len(numbers) * len(source.labels)
    print(f"{split}: {len(source.labels)} images of {len(source.classes)} classes from {source.source}")
    for k, size in enumerate(sizes):
        mean = sum(len(made[k].data) for made in pictures) / len(pictures)
        print(f"  {split}_{size}: about {mean * len(source.labels) / 1e9:.3g} GB ({mean / 1e3:.1f} kB an image)")
    print(f"  about {duration(seconds)} with {options.workers} workers, judged from {len(numbers)} images")


def command(options) -> int:
    """The prepare command."""
    kind = {"ffcv": "ffcv", "dali": "webdataset"}[options.kind]
    small = sets.known(options.dataset).size is not None
    sizes = tuple(size if size == "original" else whole(size, "--sizes") for size in options.sizes or ())
    sizes = sizes or (("original",) if small else SIZES.get(options.dataset, ("original",)))
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"--sizes names a size twice: {' '.join(options.sizes)}")
    if not 1 <= options.quality <= 95:
        raise ConfigError(f"--quality must lie between 1 and 95, not {options.quality}")
    options.storage = options.storage or ("raw" if small else "jpeg")
    options.output = options.output or records.prepared_folder(options.dataset, kind)
    choice = Choice(options.limit)
    if options.labels:
        choice = choice._replace(labels=str(layouts.find_labels(options.labels, options.data)))
    sources = {split: sets.pictures(options.dataset, split, options.data, choice=choice) for split in options.splits}
    for split, source in sources.items():
        # the test images are wanted once, in the largest size: evaluation resizes them
        wanted = sizes if split == "train" else sizes[-1:]
        if options.dry_run:
            estimate(split, source, wanted, options)
        else:
            write_split(kind, split, source, wanted, options)
    return 0


def whole(text: str, what: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{what} must be a whole number of at least 1, not {text}")
    return int(text)
