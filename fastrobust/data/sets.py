"""Data sets: what is on disk -> arrays in memory.

`load` finds a data set and reads one split of it. Archives are read in place: nothing in them is written to
disk or executed. Every problem with the data is a `DataError`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fastrobust.config import datasets
from fastrobust.config.datasets import Dataset
from fastrobust.config.places import expand
from fastrobust.data import downloads, formats, ilsvrc, layouts, packed
from fastrobust.data.held_out import ALL, SPLITS, Choice, evenly_spaced
from fastrobust.data.image_set import ImageSet
from fastrobust.runtime.errors import ConfigError, DataError, first_line

LOOKED_AT = 1000  # files of which a fingerprint has the content
_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"
_PLACES = {  # relative to the data root, in the order in which they are tried
    "mnist": ["mnist", "MNIST/raw", "."],
    "fashion_mnist": ["fashion_mnist", "fashion-mnist", "FashionMNIST/raw", _DEBIAN_FASHION],
    "cifar10": ["cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10", "cifar10-jpeg"],
    "tiny_imagenet": ["tiny-imagenet-200", "tiny-imagenet-200.zip", "tiny_imagenet"],
    "imagenet": ["imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"],
    "imagenette": ["imagenette", "imagenette2", "imagenette2-320", "imagenette2-160", "imagenette-224"],
    "image_folder": [],
}
_TORCHVISION_PLACES = ["MNIST/raw", "FashionMNIST/raw"] + [
    f"cifar-{name}" for name in ("10-batches-py", "10-python.tar.gz", "100-python", "100-python.tar.gz")
]
_IDX_NAMES = {
    "train": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
    "test": ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
}
_IDX_MD5 = {  # of the uncompressed images file and labels file
    ("mnist", "train"): ["6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"],
    ("mnist", "test"): ["2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"],
    ("fashion_mnist", "train"): ["f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"],
    ("fashion_mnist", "test"): ["8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"],
}


def load(
    dataset: str,
    split: str,
    path: str | Path | None = None,
    *,
    resolution: int | None = None,
    download: bool = False,
    limit: int | None = None,
    choice: Choice = ALL,
) -> ImageSet:
    """Read one split of a data set into memory.

    dataset: a name in `DATASETS`. split: "train", "test" or "held_out". path: the folder or file that holds the data set;
    None means the usual places. resolution: height and width in pixels to which the images of an image folder
    are resized (short side, bicubic) and centre-cropped. download: fetch the data set if it is not found.
    limit: read only this many images, see `Choice.of`. choice: which images else. Raises DataError.
    """
    facts = known(dataset, path)
    choice = choice if limit is None else choice._replace(limit=limit)
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}: use 'train' or 'test'")
    if choice.limit is not None and choice.limit < 1:
        raise DataError(f"limit must be at least 1 image, not {choice.limit}")
    size = facts.size or resolution
    if size is None or size < 1:
        raise DataError(f"{dataset} needs a resolution in pixels, for example 224, not {resolution}")
    if resolution not in (None, size):
        raise DataError(f"{dataset} images are {size} x {size} pixels: leave out the resolution {resolution}")
    side = _side(split)
    if facts.read is not None:
        images, labels, source = _read_own(dataset, facts, side, path, download)
        return _take(images, labels, facts.classes, source, split, choice)
    place = _located(dataset, path, download, choice)
    if dataset in ("mnist", "fashion_mnist"):
        images, labels, source = _read_idx_split(dataset, side, place)
        return _take(images, labels, facts.classes, source, split, choice)
    members, source, named = _members(place)
    batches = {member.name.rpartition("/")[2]: member for member in members}
    if dataset == "cifar10" and ("data_batch_1" in batches or "test_batch" in batches):
        read = formats.read_batches(batches, formats.CIFAR_BATCHES[side], source)
        return _take(*read, facts.classes, source, split, choice)
    listing = _chosen(members, split, facts.classes or named, source, place, choice)
    bad: dict[int, DataError] | None = {} if choice.skip_corrupt else None
    images = formats.decode_all(listing.members, size, facts.size is None, choice.channels, bad)
    names, labels, numbers = tuple(member.name for member in listing.members), listing.labels, listing.numbers
    if bad:
        keep = [i for i in range(len(names)) if i not in bad]
        if not keep:
            raise DataError(f"{source}: not one image of {split} is usable, such as:\n{min(bad.items())[1]}")
        images, labels, names = images[keep], labels[keep], tuple(names[i] for i in keep)
        numbers = (np.arange(len(listing.labels)) if numbers is None else numbers)[keep]
        tell_skipped([str(bad[i]) for i in sorted(bad)], split)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    skipped = tuple(str(bad[i]) for i in sorted(bad or ()))
    numbers = None if numbers is None else torch.from_numpy(numbers)
    return ImageSet(pixels, torch.from_numpy(labels), listing.classes, listing.source, names, skipped, numbers)


def tell_skipped(skipped: list[str], split: str) -> None:
    print(f"note: {len(skipped)} {split} images are left out:\n{formats.first_ten(skipped)}", flush=True)


def _side(split: str) -> str:
    """The part of the data set that a split is taken from."""
    return "test" if split == "test" else "train"


def _located(dataset: str, path: str | Path | None, download: bool, choice: Choice) -> Path:
    """`locate`, after a download where that is asked for."""
    try:
        return locate(dataset, path, choice.labels)
    except DataError:
        if not download or dataset not in downloads.CLASSES:
            raise
        downloads.fetch(dataset, data_root(path))
        return locate(dataset, path)


def _take(images: np.ndarray, labels: np.ndarray, classes, source: str, split: str, choice: Choice) -> ImageSet:
    """Those of the images N x H x W x C that are chosen."""
    keep, numbers = choice.of(labels, split, classes), None
    if len(keep) < len(labels):
        images, labels, numbers = images[keep], labels[keep], torch.from_numpy(keep)
    pixels, told = torch.from_numpy(images).permute(0, 3, 1, 2), _told(source, split, keep)
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)), classes, told, numbers=numbers)


def _told(source: str, split: str, keep: np.ndarray) -> str:
    """What to call the source of a split's images."""
    return f"{source}, {len(keep)} held-out training images" if split == "held_out" else source


def _chosen(members: list[formats.Member], split: str, classes, source: str, place: Path, choice: Choice) -> Listing:
    """Those of the files that are chosen."""
    found, labels, classes = layouts.choose(members, _side(split), classes, source, place, choice.labels)
    keep = choice.of(labels, split, classes)
    chosen, numbers = [found[i] for i in keep], None if len(keep) == len(labels) else keep
    return Listing(chosen, labels[keep].astype(np.int64), classes, _told(source, split, keep), numbers)


def _read_own(
    name: str, facts: Dataset, split: str, path: str | Path | None, download: bool
) -> tuple[np.ndarray, np.ndarray, str]:
    """What the `read` of a data set gives, checked, and its source. Raises DataError."""
    try:
        images, labels, *told = facts.read(split, None if path is None else str(path))
        images, labels = np.ascontiguousarray(images), np.asarray(labels)
    except DataError:
        if not download or name not in downloads.CLASSES:
            raise
        downloads.fetch(name, data_root(path))
        return _read_own(name, facts, split, path, False)
    except Exception as error:  # the user's code can raise anything
        raise DataError(f"{name} could not read its {split} images: {type(error).__name__}: {first_line(error)}") from error
    form = (facts.size, facts.size, facts.channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != form or not len(images):
        found = f"{images.dtype} {images.shape}"
        raise DataError(f"{name} must give {split} images as uint8 N x {' x '.join(map(str, form))}, not {found}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{name} must give one integer label for each of its {len(images)} {split} images")
    formats.check_labels(labels, len(facts.classes), f"{name}, {split}")
    if split == "train" and (labels == labels[0]).all():
        raise DataError(
            f"{name}: all {len(labels)} training images are of class {labels[0]}: there is nothing to tell apart"
        )
    return images, labels, told[0] if told else name


class Listing(NamedTuple):
    """The image files of a split, in the order in which `load` gives them, unread."""

    members: list[formats.Member]
    labels: np.ndarray  # int64
    classes: tuple[str, ...]
    source: str
    numbers: np.ndarray | None = None  # of each in the whole split; None where these are all of it


def list_images(dataset: str, split: str, path: str | Path | None = None, choice: Choice = ALL) -> Listing:
    """The image files of one split of an image folder (or tars of one): for what reads them one by one. Raises DataError."""
    place = locate(dataset, path, choice.labels)
    members, source, named = _members(place)
    return _chosen(members, split, named and (known(dataset).classes or named), source, place, choice)


def has_test_images(dataset: str, path: str | Path | None = None, labels: str | None = None) -> bool:
    """Whether a data set comes with test images. Raises DataError."""
    if known(dataset).size is not None:
        return True
    place = locate(dataset, path, labels)
    groups = layouts.grouped(_members(place)[0], place, labels)[1]
    return any(name in groups for name in layouts.SPLITS["test"])


class Pictures(NamedTuple):
    """A split image by image: image(i) decodes number i (RGB), or raises DataError; where(i) says which it is, and name(i)
    is its file's name. members: the files, where each image has its own."""

    image: Callable[[int], Image.Image]
    where: Callable[[int], str]
    name: Callable[[int], str]
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str
    members: list[formats.Member] | None = None

    def checksum(self) -> str:
        """SHA-256 of the labels and of the names of classes and files; the images are not read."""
        names = [self.name(i) for i in range(len(self.labels))]
        return hashlib.sha256("\0".join([*self.classes, *names]).encode() + self.labels.tobytes()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of the checksum and of the ends of up to LOOKED_AT files, evenly spaced: it tells the source from one with
        other images under the same names, without reading all of them."""
        digest = hashlib.sha256(self.checksum().encode())
        for i in evenly_spaced(len(self.labels), LOOKED_AT).tolist():
            try:
                ends = self.members[i].ends() if self.members else (self.image(i).tobytes(),)
            except (OSError, DataError) as error:  # also where the same file is read again
                ends = (type(error).__name__.encode(),)
            digest.update(b"\0".join(ends))
        return digest.hexdigest()

    def without(self, numbers: Collection[int]) -> Pictures:
        """The same without the images that have these numbers."""
        keep = [i for i in range(len(self.labels)) if i not in numbers]
        return pictures_of(Listing([self.members[i] for i in keep], self.labels[keep], self.classes, self.source))


def pictures(
    dataset: str, split: str, path: str | Path | None = None, limit: int | None = None, choice: Choice = ALL
) -> Pictures:
    """One split of any data set, to be read one by one. Raises DataError."""
    choice = choice if limit is None else choice._replace(limit=limit)
    if known(dataset, path).size is None:
        return pictures_of(list_images(dataset, split, path, choice))
    data = load(dataset, split, path, choice=choice)
    pixels = data.images.permute(0, 2, 3, 1).numpy()
    pixels = pixels[..., 0] if pixels.shape[3] == 1 else pixels
    image, where = (lambda i: Image.fromarray(pixels[i]).convert("RGB")), (lambda i: f"image {i} of {data.source}")
    return Pictures(image, where, lambda i: str(i), data.labels.numpy(), data.classes, data.source)


def pictures_of(listing: Listing) -> Pictures:
    """The images of these files."""
    members = listing.members
    image, where = (lambda i: formats.open_upright(members[i])), (lambda i: members[i].where)
    return Pictures(image, where, lambda i: members[i].name.rpartition("/")[2], *listing[1:4], members)


def _members(place: Path) -> tuple[list[formats.Member], str, tuple[str, ...] | None]:
    """All files of a folder or of its archives, what to call their source, and the classes where their order is known."""
    if official := ilsvrc.folder_of(place):
        return list(ilsvrc.members(official)), str(official), None
    if found := packed.read(place):
        return found.members, found.source, found.classes
    archives = _archives(place)
    if not archives:
        return formats.folder_members(place), str(place), None
    listings = [formats.archive_members(archive) for archive in archives]
    if archives != [place]:
        listings = list(map(layouts.below, listings, archives))
    return [member for listing in listings for member in listing], ", ".join(map(str, archives)), None


def locate(dataset: str, path: str | Path | None = None, labels: str | None = None) -> Path:
    """The folder or file that `load` would read, judged by file names; nothing is opened or fetched.

    path: that folder or file itself, or a folder that torchvision downloaded into. None means the usual
    places in $FASTROBUST_DATA, or in ./data if that is not set. Raises DataError that lists where it looked.
    """
    known(dataset)
    if labels and path is not None and data_root(path).exists():  # any folders
        return data_root(path)
    return find(dataset, _PLACES[dataset], path, lambda place: _problem(dataset, place))


def find(dataset: str, names: list[str], path: str | Path | None, problem_of: Callable[[Path], str | None]) -> Path:
    """The first of some places that has no problem; `names` are relative to the data root. With a path only this is looked
    at, and below it the places that torchvision downloads to. Raises DataError that lists where it looked."""
    if path is not None:
        names = [name for name in names if name in _TORCHVISION_PLACES] + ["."]
    looked = []
    for place in (data_root(path) / name for name in names):
        try:
            problem = problem_of(place)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem is None:
            return place
        looked.append(f"  {place}: {problem}")
    advice = (
        "Set `data.download: true` or `data.path` in the config, give `--data PATH` to a command that takes it, or set the\n"
        f"variable FASTROBUST_DATA (now {os.environ.get('FASTROBUST_DATA') or 'not set'}) to the data sets' folder.\n"
        "`apt-get install dataset-fashion-mnist` installs fashion_mnist."
    )
    if dataset not in downloads.CLASSES:
        advice = f"Set `data.path` in the config, or give `--data PATH` to a command that takes it: {layouts.LAYOUT}"
    looked = looked or ["  nowhere: it has no usual place"]
    raise DataError("\n".join([f"{dataset} was not found. Looked in:", *looked, advice]))


def read_idx_pair(images_path: Path, labels_path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read two idx files, plain or gzipped: uint8 images N x 28 x 28 and uint8 labels N, all below `classes`.

    Raises DataError if a file is damaged or the two do not belong together.
    """
    images = formats.read_idx(images_path, (28, 28))
    labels = formats.read_idx(labels_path, ())
    if len(images) != len(labels):
        counts = f"{len(images)} images and {len(labels)} labels"
        raise DataError(f"{images_path} and {labels_path} hold {counts}: fetch both again")
    formats.check_labels(labels, classes, labels_path)
    return images, labels


def known(dataset: str, path: str | Path | None = None) -> Dataset:
    try:
        return datasets.facts(dataset, None if path is None else str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None


def data_root(path: str | Path | None) -> Path:
    """The user's path, or else the folder in which data sets are looked for and downloaded."""
    return Path(expand(path if path is not None else os.environ.get("FASTROBUST_DATA") or "data"))


def _problem(dataset: str, place: Path) -> str | None:
    """Why a place cannot be the data set, judged by the names of its files; None if it can."""
    if not place.exists():
        return "does not exist"
    if dataset in ("mnist", "fashion_mnist"):
        absent = [name for names in _IDX_NAMES.values() for name in names if _idx_file(place, name) is None]
        return f"lacks {', '.join(absent)} (plain or .gz)" if absent else None
    if place.is_file() or layouts.has_splits(place) or packed.files(place):
        return None
    batches = [name for names in formats.CIFAR_BATCHES.values() for name in names]
    absent = [name for name in batches if not (place / name).is_file()]
    if dataset == "cifar10" and len(absent) < len(batches):
        return f"lacks {', '.join(absent)}" if absent else None
    archives = _archives(place)
    if dataset == "cifar10" and len(archives) > 1:
        return f"holds {len(archives)} archives: give the `path` of one"
    if archives or layouts.has_classes(place):
        return None
    there = [f"{child.name}/" if child.is_dir() else child.name for child in layouts.shown(place)]
    found = f"it holds {layouts.first_five(there)}" if there else "it is empty"
    return f"holds neither train/ nor test/ nor a file *{', *'.join(formats.ARCHIVE_SUFFIXES)}; {found}"


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _archives(place: Path) -> list[Path]:
    """The tar files that make up the data set, in order; none if it is a folder of files."""
    if place.is_file():
        return [place]
    if layouts.has_splits(place):
        return []
    return sorted(file for file in place.iterdir() if file.name.endswith(formats.ARCHIVE_SUFFIXES))


def _read_idx_split(dataset: str, split: str, folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Checked images N x 28 x 28 x 1, labels N and the names of their files."""
    files = [_idx_file(folder, name) or folder / name for name in _IDX_NAMES[split]]
    images, labels = read_idx_pair(files[0], files[1], 10)
    for file, array, expected in zip(files, (images, labels), _IDX_MD5[dataset, split], strict=True):
        header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
        found = hashlib.md5(header + array.tobytes(), usedforsecurity=False).hexdigest()
        if found != expected:
            raise DataError(
                f"{file} is not the one of {dataset}: its content has the MD5 checksum {found}, not "
                f"{expected}: fetch it again, or use an image_folder for images of your own"
            )
    return images[..., None], labels, ", ".join(map(str, files))
