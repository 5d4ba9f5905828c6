"""Data sets: what is on disk -> arrays in memory.

`load` finds a data set and reads one split of it. Archives are read in place: nothing in them is written to
disk or executed. Every problem with the data is a `DataError`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fastrobust.config import datasets
from fastrobust.config.datasets import Dataset
from fastrobust.data import formats, ilsvrc, layouts
from fastrobust.models.torchvision_compat import import_torchvision
from fastrobust.runtime.errors import ConfigError, DataError, first_line

SPREAD = "each class in proportion, evenly spaced"  # the rule of `spread`, as results name it


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    images: uint8, N x C x H x W, stored as N, H, W, C and permuted (channels-last memory).
    labels: int64, N; each is an index into `classes`.
    classes: class names in label order.
    source: the file(s) or folder that the images came from, for records.
    numbers: int64, N, of each image in the whole split; None where these are all of it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str
    numbers: torch.Tensor | None = None

    def labelled_as(self, classes: tuple[str, ...], whose: str) -> ImageSet:
        """The same images with labels that are indices into `classes`, matched by name. A note names the classes that this
        set does not have. Raises DataError if this set has a class that is not in `classes`."""
        if self.classes == classes:
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise DataError(
                f"{self.source} has images of {listed(unknown)}, but {whose} was trained on {listed(classes)}: "
                "give images of the same classes, under the same names"
            )
        places = torch.tensor([classes.index(name) for name in self.classes])
        absent = [name for name in classes if name not in self.classes]
        if absent:
            print(
                f"note: {self.source} has no images of {listed(absent)}: accuracies are over the other classes", flush=True
            )
        return replace(self, labels=places[self.labels], classes=classes)

    def take(self, numbers: Sequence[int]) -> ImageSet:
        """The images with these numbers, in this order."""
        index = torch.as_tensor(numbers, dtype=torch.int64)
        among = index if self.numbers is None else self.numbers[index]
        return replace(self, images=self.images[index], labels=self.labels[index], numbers=among)

    @property
    def chosen(self) -> str:
        """By which rule these images were chosen of their split, for records. Older records do not have it: of a limited
        number of test images they hold those that `evenly_spaced` gives, whatever their class."""
        return "all" if self.numbers is None else SPREAD

    def checksum(self) -> str:
        """SHA-256 of the pixels as stored, the labels and the names of the classes: what a result says it is about."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.labels.numpy())
        for image in self.images.permute(0, 2, 3, 1).split(1024):
            digest.update(np.ascontiguousarray(image.numpy()))
        return digest.hexdigest()


_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"
_PLACES = {  # relative to the data root, in the order in which they are tried
    "mnist": ["mnist", "MNIST/raw", "."],
    "fashion_mnist": ["fashion_mnist", "fashion-mnist", "FashionMNIST/raw", _DEBIAN_FASHION],
    "cifar10": ["cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10", "cifar10-jpeg"],
    "imagenet": ["imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"],
    "imagenette": ["imagenette", "imagenette2", "imagenette2-320", "imagenette2-160", "imagenette-224"],
    "image_folder": [],
}
_TORCHVISION_PLACES = ["MNIST/raw", "FashionMNIST/raw", "cifar-10-batches-py", "cifar-10-python.tar.gz"]
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
) -> ImageSet:
    """Read one split of a data set into memory.

    dataset: a name in `DATASETS`. split: "train" or "test". path: the folder or file that holds the data set;
    None means the usual places. resolution: height and width in pixels to which the images of an image folder
    are resized (short side, bicubic) and centre-cropped. download: fetch the data set if it is not found.
    limit: read only this many images: see `chosen`. Raises DataError.
    """
    facts = known(dataset, path)
    if split not in layouts.SPLITS:
        raise DataError(f"there is no split {split!r}: use 'train' or 'test'")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 image, not {limit}")
    size = facts.size or resolution
    if size is None or size < 1:
        raise DataError(f"{dataset} needs a resolution in pixels, for example 224, not {resolution}")
    if resolution not in (None, size):
        raise DataError(f"{dataset} images are {size} x {size} pixels: leave out the resolution {resolution}")
    if facts.read is not None:
        return _take(*_read_own(dataset, facts, split, path), facts.classes, dataset, split, limit)
    try:
        place = locate(dataset, path)
    except DataError:
        if not download or facts.size is None:
            raise
        _download(dataset, data_root(path))
        place = locate(dataset, path)

    classes = facts.classes
    if dataset in ("mnist", "fashion_mnist"):
        images, labels, source = _read_idx_split(dataset, split, place)
    else:
        members, source = _members(place)
        batches = {member.name.rpartition("/")[2]: member for member in members}
        if dataset == "cifar10" and ("data_batch_1" in batches or "test_batch" in batches):
            images, labels = formats.read_batches(batches, split, source)
        else:
            found, labels, classes = layouts.choose(members, split, classes, source, place)
            keep = chosen(labels, classes, split, limit)
            images = formats.decode_all([found[i] for i in keep], size, facts.size is None)
            numbers = None if len(keep) == len(labels) else torch.from_numpy(keep)
            return replace(_take(images, labels[keep], classes, source, split, None), numbers=numbers)
    return _take(images, labels, classes, source, split, limit)


def _take(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str, split: str, limit: int | None
) -> ImageSet:
    """The images N x H x W x C, or `limit` of them."""
    numbers = None
    if limit is not None and limit < len(labels):
        keep = chosen(labels, classes, split, limit)
        images, labels, numbers = images[keep], labels[keep], torch.from_numpy(keep)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)), classes, source, numbers)


def _read_own(name: str, facts: Dataset, split: str, path: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """What a data set of the user's own gives, checked. Raises DataError."""
    try:
        images, labels = facts.read(split, None if path is None else str(path))
        images, labels = np.ascontiguousarray(images), np.asarray(labels)
    except DataError:
        raise
    except Exception as error:  # the user's code can raise anything
        raise DataError(f"{name} could not read its {split} images: {type(error).__name__}: {first_line(error)}") from error
    form = (facts.size, facts.size, facts.channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != form or not len(images):
        found = f"{images.dtype} {images.shape}"
        raise DataError(f"{name} must give {split} images as uint8 N x {' x '.join(map(str, form))}, not {found}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{name} must give one integer label for each of its {len(images)} {split} images")
    formats.check_labels(labels, len(facts.classes), f"{name}, {split}")
    return images, labels


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many there are."""
    shown = ", ".join(map(str, names[:most]))
    return f"{len(names)} classes ({shown}{', ...' if len(names) > most else ''})" if len(names) > 1 else f"class {shown}"


class Listing(NamedTuple):
    """The image files of a split, in the order in which `load` gives them, unread."""

    members: list[formats.Member]
    labels: np.ndarray  # int64
    classes: tuple[str, ...]
    source: str


def list_images(dataset: str, split: str, path: str | Path | None = None, limit: int | None = None) -> Listing:
    """The image files of one split of an image folder (or tars of one): for what reads them one by one. Raises DataError."""
    place = locate(dataset, path)
    members, source = _members(place)
    found, labels, classes = layouts.choose(members, split, None, source, place)
    keep = chosen(labels, classes, split, limit)
    return Listing([found[i] for i in keep], labels[keep].astype(np.int64), classes, source)


class Pictures(NamedTuple):
    """A split image by image: image(i) decodes number i (RGB), or raises DataError; where(i) says which it is, and name(i)
    is its file's name."""

    image: Callable[[int], Image.Image]
    where: Callable[[int], str]
    name: Callable[[int], str]
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str

    def checksum(self) -> str:
        """SHA-256 of the labels and of the names of classes and files; the images are not read."""
        names = [self.name(i) for i in range(len(self.labels))]
        return hashlib.sha256("\0".join([*self.classes, *names]).encode() + self.labels.tobytes()).hexdigest()


def pictures(dataset: str, split: str, path: str | Path | None = None, limit: int | None = None) -> Pictures:
    """One split of any data set, to be read one by one. Raises DataError."""
    if known(dataset, path).size is None:
        members, *facts = list_images(dataset, split, path, limit)
        image, where = (lambda i: formats.open_upright(members[i])), (lambda i: members[i].where)
        return Pictures(image, where, lambda i: members[i].name.rpartition("/")[2], *facts)
    data = load(dataset, split, path, limit=limit)
    pixels = data.images.permute(0, 2, 3, 1).numpy()
    pixels = pixels[..., 0] if pixels.shape[3] == 1 else pixels
    image, where = (lambda i: Image.fromarray(pixels[i]).convert("RGB")), (lambda i: f"image {i} of {data.source}")
    return Pictures(image, where, lambda i: str(i), data.labels.numpy(), data.classes, data.source)


def _members(place: Path) -> tuple[list[formats.Member], str]:
    """All files of a folder or of its archives, and what to call their source."""
    if official := ilsvrc.folder_of(place):
        return list(ilsvrc.members(official)), str(official)
    archives = _archives(place)
    listings = [formats.archive_members(archive) for archive in archives] or [formats.folder_members(place)]
    return [member for listing in listings for member in listing], ", ".join(map(str, archives)) or str(place)


def locate(dataset: str, path: str | Path | None = None) -> Path:
    """The folder or file that `load` would read, judged by file names; nothing is opened or fetched.

    path: that folder or file itself, or a folder that torchvision downloaded into. None means the usual
    places in $FASTROBUST_DATA, or in ./data if that is not set. Raises DataError that lists where it looked.
    """
    known(dataset)
    names = _PLACES[dataset]
    if path is not None:
        names = [name for name in names if name in _TORCHVISION_PLACES] + ["."]
    looked = []
    for place in (data_root(path) / name for name in names):
        try:
            problem = _problem(dataset, place)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem is None:
            return place
        looked.append(f"  {place}: {problem}")
    advice = (
        "Set `download: true` or a `path` in the config's data section, or the environment variable\n"
        f"FASTROBUST_DATA (now {os.environ.get('FASTROBUST_DATA') or 'not set'}) to the data sets' folder.\n"
        "`apt-get install dataset-fashion-mnist` installs fashion_mnist."
    )
    if known(dataset).size is None:
        advice = f"Set `path` in the config's data section to {layouts.LAYOUT}"
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
    return Path(path if path is not None else os.environ.get("FASTROBUST_DATA") or "data").expanduser()


def _problem(dataset: str, place: Path) -> str | None:
    """Why a place cannot be the data set, judged by the names of its files; None if it can."""
    if not place.exists():
        return "does not exist"
    if dataset in ("mnist", "fashion_mnist"):
        absent = [name for names in _IDX_NAMES.values() for name in names if _idx_file(place, name) is None]
        return f"lacks {', '.join(absent)} (plain or .gz)" if absent else None
    if place.is_file() or _is_split(place):
        return None
    batches = [name for names in formats.CIFAR_BATCHES.values() for name in names]
    absent = [name for name in batches if not (place / name).is_file()]
    if dataset == "cifar10" and len(absent) < len(batches):
        return f"lacks {', '.join(absent)}" if absent else None
    archives = _archives(place)
    if dataset == "cifar10" and len(archives) > 1:
        return f"holds {len(archives)} archives: give the `path` of one"
    return None if archives else f"holds neither train/ nor test/ nor a file *{', *'.join(formats.ARCHIVE_SUFFIXES)}"


def _is_split(place: Path) -> bool:
    """Whether a folder holds the folder of a split, itself or in the one folder that is in it."""
    inside = [child for child in place.iterdir() if child.is_dir() and not layouts.is_hidden(child.name)]
    known = {name for names in layouts.SPLITS.values() for name in names}
    return any(child.name in known for child in inside) or (len(inside) == 1 and _is_split(inside[0]))


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _archives(place: Path) -> list[Path]:
    """The tar files that make up the data set, in order; none if it is a folder of files."""
    if place.is_file():
        return [place]
    if _is_split(place):
        return []
    return sorted(file for file in place.iterdir() if file.name.endswith(formats.ARCHIVE_SUFFIXES))


def _download(dataset: str, root: Path) -> None:
    datasets = import_torchvision().datasets
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
    try:
        getattr(datasets, kind)(str(root), download=True)
    except Exception as error:  # whatever the network, the server or the disk came up with
        raise DataError(
            f"{dataset} could not be downloaded to {root} ({type(error).__name__}: {error}). "
            "Check the network and the folder, or copy the data set there"
        ) from error


def evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """Ascending indices of `limit` of `count` things, or of all of them."""
    taken = count if limit is None else min(limit, count)
    return np.arange(taken) * count // taken


def chosen(labels: np.ndarray, classes: Sequence[str], split: str, limit: int | None) -> np.ndarray:
    """Ascending numbers of the images of a split that a limit leaves: the one rule of all commands. Training images are
    `evenly_spaced`, whatever their class: weights of runs depend on it. Test images are `spread`."""
    return evenly_spaced(len(labels), limit) if split == "train" else spread(labels, classes, limit)


def spread(labels: np.ndarray, classes: Sequence[str], limit: int | None) -> np.ndarray:
    """Ascending numbers of `limit` images: every class has its share of them, rounded up or down, evenly spaced over the
    images of the class. labels are indices into the names `classes`; the order of the names does not matter. A set that is
    sorted by class gives what `evenly_spaced` gives."""
    rank = np.argsort(np.argsort(np.asarray(classes)))
    return np.sort(np.argsort(rank[np.asarray(labels)], kind="stable")[evenly_spaced(len(labels), limit)])


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
