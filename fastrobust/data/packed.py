"""Files of other programs that hold many images: FFCV's own files and WebDataset shards, read as an image folder is.

train_500_0.50_90.ffcv, val_500_0.50_90.ffcv       an RGB field and an integer field, as FFCV's scripts for ImageNet write
imagenet-train-0000.tar, imagenet-val-0000.tar     KEY.jpg (png, webp, …) and KEY.cls, or KEY.json with `cls` or `label`
train/0.tar, test/0.tar                            the same
classnames.txt                                     beside them, if it is there: a name on each line, in the order of labels

The split is a word of the file's name or of its folder's. Labels are numbers, unless shards have names in their place.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrobust.data import formats
from fastrobust.data.formats import Member
from fastrobust.runtime.errors import DataError

FFCV = (".beton", ".ffcv")
ENDINGS = (*FFCV, *formats.ARCHIVE_SUFFIXES)
SIDES = ("train", "test", "val", "valid", "validation")
NAMES = "classnames.txt"
LABELS = ("cls", "label", "class")  # keys of a .json, the first that is there
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
KINDS = {0: "<f8", 1: "<i8", 2: IMAGE, 3: "<u8,<u8", 4: "<u8", 5: "<u8,<u8", 6: "<u8"}  # of FFCV's fields, by type
VERSION, INT, RGB_IMAGE, RAW = 2, 1, 2, 1


class Packed(NamedTuple):
    """The images by the names that they would have in an image folder, and the classes in the order of the labels."""

    members: list[Member]
    classes: tuple[str, ...]
    source: str


class Table(NamedTuple):
    """What an FFCV file says of its images: arrays of length N."""

    offset: np.ndarray
    length: np.ndarray
    height: np.ndarray
    width: np.ndarray
    raw: np.ndarray
    label: np.ndarray


def files(place: Path) -> list[Path]:
    """The files of FFCV or the shards that a place holds; none if it holds something else."""
    if place.is_file():
        found = [place]
    elif place.is_dir():
        inside = [folder for folder in place.iterdir() if folder.name.lower() in SIDES and folder.is_dir()]
        named = [file for folder in (place, *inside) for file in folder.iterdir() if file.name.endswith(ENDINGS)]
        found = sorted(file for file in named if file.is_file())
    else:
        return []
    if packed := [file for file in found if file.suffix in FFCV]:
        return packed
    shards = [file for file in found if file.name.endswith(formats.ARCHIVE_SUFFIXES) and file.suffix != ".zip"]
    return shards if shards and is_shard(str(shards[0]), shards[0].stat().st_mtime_ns) else []


@lru_cache(64)
def is_shard(file: str, changed: int) -> bool:
    """Whether an archive begins as WebDataset shards do: an image and its label, side by side."""
    try:
        with open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            names = [info.name for info, _ in zip(archive, range(16), strict=False)]
    except (tarfile.TarError, EOFError, OSError, ValueError):
        return False
    keys = {key for key, ending in map(parted, names) if ending == "cls" or (ending == "json" and "/" not in key)}
    return any(formats.is_image(name) and parted(name)[0] in keys for name in names)


def parted(name: str) -> tuple[str, str]:
    """A file's key, and what comes after the first dot of its name."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    return (f"{folder}/{key}" if folder else key), ending.lower()


def read(place: Path) -> Packed | None:
    """What a place holds, if it is files of these kinds; the first time it is said. Raises DataError."""
    there = files(place)
    if not there:
        return None
    folder = place if place.is_dir() else place.parent
    refuse_prepared(there)
    names = folder / NAMES
    state = [
        (file, file.stat().st_size, file.stat().st_mtime_ns) for file in (*there, *([names] if names.is_file() else []))
    ]
    return _read(tuple(there), names if names.is_file() else None, str(place), tuple(state))


@lru_cache(4)
def _read(there: tuple[Path, ...], names: Path | None, source: str, state: tuple) -> Packed:
    found: dict[str, list[tuple[str | int, str, Member]]] = {}
    ffcv = there[0].suffix in FFCV
    sides = by_side(there)
    for side, group in sides.items():
        if ffcv and len(group) > 1:
            raise DataError(
                f"{source} holds {len(group)} FFCV files of {side}: {', '.join(f.name for f in group)}: name one"
            )
        found[side] = [entry for file in group for entry in (ffcv_images(file) if ffcv else shard_images(file))]
    labels = {label for images in found.values() for label, _, _ in images}
    numbered = {type(label) for label in labels}
    if len(numbered) != 1:
        raise DataError(f"{source}: labels must be all numbers or all names" if labels else f"{source} holds no images")
    if numbered == {str}:
        classes = tuple(sorted(labels))
    else:
        classes = tuple(map(str, range(max(labels) + 1)))
        if names is not None:
            classes = tuple(line.strip() for line in formats.read_text(names).splitlines() if line.strip())
            if max(labels) >= len(classes) or len(set(classes)) < len(classes):
                raise DataError(
                    f"{names} must have a name for each label, 0 to {max(labels)}, each once: it has {len(classes)}"
                )
    if odd := [name for name in classes if "/" in name or name.startswith(".")]:
        raise DataError(f"{source}: the class '{odd[0]}' must not have a / or begin with a dot")
    counts = ", ".join(f"{len(images):,} {side} images" for side, images in found.items())
    told = f"{len(classes)} classes" if numbered == {str} or names else f"labels 0 to {max(labels)}, no class names: numbers"
    print(f"{'FFCV files' if ffcv else 'WebDataset shards'} in {source}: {counts}; {told}", flush=True)
    members = [
        member._replace(name=f"{side}/{label if isinstance(label, str) else classes[label]}/{name}")
        for side, images in found.items()
        for label, name, member in images
    ]
    return Packed(members, classes, source)


def by_side(there: tuple[Path, ...]) -> dict[str, list[Path]]:
    """The files of each split. Raises DataError."""
    sides: dict[str, list[Path]] = {}
    for file in there:
        words = [*re.split(r"[^a-z]+", file.name.lower()), file.parent.name.lower()]
        side = next((word for word in words if word in SIDES), None)
        if side is None and len(there) > 1:
            raise DataError(f"{file}: its name must say whether it is train, test or val")
        sides.setdefault(side or "train", []).append(file)
    return sides


def refuse_prepared(there: list[Path]) -> None:
    """Files that `fastrobust prepare` wrote have a manifest with the names of their classes. Raises DataError."""
    for folder in {file.parent for file in there}:
        stems = tuple(file.stem for file in folder.glob("*_*.json") if file.stem.startswith(SIDES))
        if stems and any(file.parent == folder and file.name.startswith(stems) for file in there):
            raise DataError(f"{folder} holds prepared files: set data.prepared to it, and leave out data.path")


def ffcv_images(file: Path) -> Iterator[tuple[int, str, Member]]:
    """(label, name, the image) of each image in a file of FFCV's."""
    table = ffcv_table(file)
    rows = zip(*(array.tolist() for array in table), strict=True)
    for i, (offset, length, height, width, raw, label) in enumerate(rows):
        read = partial(bare, file, offset, height, width) if raw else partial(formats.read_at, file, offset, length)
        yield label, f"{i:08}.{'ppm' if raw else 'jpg'}", Member("", f"image {i} of {file}", read)


def bare(file: Path, offset: int, height: int, width: int) -> bytes:
    """Bare pixels as a file of the kind ppm."""
    data = formats.read_at(file, offset, 3 * height * width)
    return b"P6\n%d %d\n255\n" % (width, height) + data


def ffcv_table(file: Path) -> Table:
    """Where the images of a file of FFCV's are, checked: all of them lie within the file. Raises DataError."""
    with formats.opened(file) as stream:
        size = file.stat().st_size
        content = np.frombuffer(stream.read(HEADER.itemsize), np.uint8)
        if len(content) < HEADER.itemsize:
            raise EOFError(f"{size} bytes")
        header = content.view(HEADER)[0]
        count, table = int(header["samples"]), int(header["allocations"])
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']} of FFCV's format, not {VERSION}")
        fields = np.frombuffer(stream.read(int(header["fields"]) * FIELD.itemsize), FIELD)
        names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
        kinds = fields["type"].tolist()
        said = ", ".join(f"{name} (type {kind})" for name, kind in zip(names, kinds, strict=True)) or "none"
        images = [i for i, kind in enumerate(kinds) if kind == RGB_IMAGE]
        labels = [i for i, kind in enumerate(kinds) if kind == INT]
        labels = [i for i in labels if names[i] == "label"] if len(labels) > 1 else labels
        if len(images) != 1 or len(labels) != 1 or not set(kinds) <= KINDS.keys():
            raise DataError(f"{file} must have one field of RGB images and one integer, the label; its fields are {said}")
        sample = np.dtype([(f"f{i}", KINDS[kind]) for i, kind in enumerate(kinds)], align=True)
        if not count or not table or size < stream.tell() + count * sample.itemsize or size <= table:
            raise EOFError(f"{count} images claimed, {size} bytes there: its writer did not finish, or it was cut short")
        samples = np.frombuffer(stream.read(count * sample.itemsize), sample)
        stream.seek(table)
        rest = stream.read()
    if len(rest) % ALLOCATION.itemsize:
        raise DataError(f"{file} is truncated (its last table is not whole): fetch it again")
    allocations = np.frombuffer(rest, ALLOCATION)
    image, label = samples[f"f{images[0]}"], samples[f"f{labels[0]}"].astype(np.int64)
    order = np.argsort(allocations["pointer"], kind="stable")
    pointers = allocations["pointer"][order]
    place = np.minimum(np.searchsorted(pointers, image["pointer"]), max(0, len(pointers) - 1))
    known = len(pointers) > 0 and (pointers[place] == image["pointer"]).all()
    length = allocations["size"][order][place].astype(np.int64) if known else np.zeros(0, np.int64)
    height, width, raw = image["height"].astype(np.int64), image["width"].astype(np.int64), image["mode"] == RAW
    offset = image["pointer"].astype(np.int64)
    if (
        not known
        or (offset < 0).any()
        or (offset + length > table).any()
        or min(height.min(), width.min()) < 1
        or (raw & (length < 3 * height * width)).any()
    ):
        raise DataError(f"{file} is damaged (its tables do not fit each other): fetch it again")
    if label.min() < 0:
        raise DataError(f"{file}: label {label.min()} of image {label.argmin()} is negative")
    return Table(offset, length, height, width, raw, label)


def shard_images(file: Path) -> Iterator[tuple[str | int, str, Member]]:
    """(label, name, the image) of each image in a shard. Raises DataError."""
    samples: dict[str, dict[str, Member]] = {}
    for member in formats.tar_members(file):
        key, ending = parted(member.name)
        sample = samples.setdefault(key, {})
        if ending in sample:
            raise DataError(f"{member.where} is there twice: fetch it again")
        sample[ending] = member
    for key, sample in samples.items():
        images = [member for ending, member in sample.items() if formats.is_image(f"x.{ending}")]
        if len(images) > 1:
            raise DataError(f"{key} in {file} has {len(images)} images: one is needed, beside its label")
        if images:
            name = f"{file.name.partition('.')[0]}-{key.replace('/', '-')}.{parted(images[0].name)[1]}"
            yield label_of(key, sample, file), name, images[0]


def label_of(key: str, sample: dict[str, Member], file: Path) -> str | int:
    """The label of a sample of a shard: a number, or the name of a class. Raises DataError."""
    where = f"{key} in {file}"
    if "cls" in sample:
        found = sample["cls"].read().decode("utf-8", "replace").strip()
    elif "json" in sample:
        try:
            facts = json.loads(sample["json"].read())
            found = next(facts[word] for word in LABELS if word in facts)
        except (ValueError, TypeError, StopIteration):
            raise DataError(f"{where}: its .json must have one of {', '.join(LABELS)}") from None
    else:
        raise DataError(f"{where} has neither .cls nor .json, so no label")
    if isinstance(found, str) and re.fullmatch(r"-?[0-9]{1,18}", found):
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "" or (isinstance(found, int) and found < 0):
        raise DataError(f"{where}: its label {found!r} is neither a number from 0 nor the name of a class")
    return found
