"""Data sets: what is on disk -> arrays in memory.

`load` finds a data set and reads one split of it. Archives are read in place: nothing in them is written to
disk or executed. Every problem with the data is a `DataError`.
"""

import difflib
import gzip
import hashlib
import io
import lzma
import math
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from fastrobust.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    images: uint8, N x C x H x W, stored as N, H, W, C and permuted (channels-last memory).
    labels: int64, N; each is an index into `classes`.
    classes: class names in label order.
    source: the file(s) or folder that the images came from, for records.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    source: str


class DatasetFacts(NamedTuple):
    """What is fixed about a data set; None where the user's data and settings decide."""

    channels: int  # 1 (grey) or 3 (RGB)
    size: int | None  # height and width in pixels
    classes: tuple[str, ...] | None  # in label order


_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASETS: dict[str, DatasetFacts] = {
    "mnist": DatasetFacts(1, 28, tuple("0123456789")),
    "fashion_mnist": DatasetFacts(1, 28, _FASHION),
    "cifar10": DatasetFacts(3, 32, _CIFAR),
    "image_folder": DatasetFacts(3, None, None),
}
_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"
_PLACES = {  # relative to the data root, in the order in which they are tried
    "mnist": ["mnist", "MNIST/raw", "."],
    "fashion_mnist": ["fashion_mnist", "fashion-mnist", "FashionMNIST/raw", _DEBIAN_FASHION],
    "cifar10": ["cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10", "cifar10-jpeg"],
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
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_PICKLE_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_SPLIT_FOLDERS = {"train": ["train"], "test": ["test", "val", "validation"]}
_LAYOUT = "a folder or tar file(s) of train/<class>/<image> and one of test/..., val/..., validation/..."
_ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_IMAGE_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF"]
_DAMAGE = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError, OverflowError)
_MEMINFO = Path("/proc/meminfo")


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
    limit: read only this many images, evenly spaced over the split. Raises DataError.
    """
    facts = _facts(dataset)
    if split not in _SPLIT_FOLDERS:
        raise DataError(f"there is no split {split!r}: use 'train' or 'test'")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 image, not {limit}")
    size = facts.size or resolution
    if size is None or size < 1:
        raise DataError(f"{dataset} needs a resolution in pixels, for example 224, not {resolution}")
    if resolution not in (None, size):
        raise DataError(f"{dataset} images are {size} x {size} pixels: leave out the resolution {resolution}")
    try:
        place = locate(dataset, path)
    except DataError:
        if not download or dataset == "image_folder":
            raise
        _download(dataset, _root(path))
        place = locate(dataset, path)

    classes = facts.classes
    if dataset in ("mnist", "fashion_mnist"):
        images, labels, source = _read_idx_split(dataset, split, place)
    else:
        archives = _archives(place)
        source = ", ".join(map(str, archives)) or str(place)
        listings = [_tar_members(archive) for archive in archives] or [_folder_members(place)]
        members = [member for listing in listings for member in listing]
        batches = {member.name.rpartition("/")[2]: member for member in members}
        if dataset == "cifar10" and ("data_batch_1" in batches or "test_batch" in batches):
            images, labels = _read_batches(batches, split, source)
        else:
            chosen, labels, classes = _split_members(members, split, classes, source)
            keep = _evenly_spaced(len(chosen), limit)
            images, labels = _decode_all([chosen[i] for i in keep], size, facts.size is None), labels[keep]
    if limit is not None and limit < len(labels):
        keep = _evenly_spaced(len(labels), limit)
        images, labels = images[keep], labels[keep]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)), classes, source)


def locate(dataset: str, path: str | Path | None = None) -> Path:
    """The folder or file that `load` would read, judged by file names; nothing is opened or fetched.

    path: that folder or file itself, or a folder that torchvision downloaded into. None means the usual
    places in $FASTROBUST_DATA, or in ./data if that is not set. Raises DataError that lists where it looked.
    """
    _facts(dataset)
    names = _PLACES[dataset]
    if path is not None:
        names = [name for name in names if name in _TORCHVISION_PLACES] + ["."]
    looked = []
    for place in (_root(path) / name for name in names):
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
    if dataset == "image_folder":
        advice = f"Set `path` in the config's data section to {_LAYOUT}"
    raise DataError("\n".join([f"{dataset} was not found. Looked in:", *looked, advice]))


def read_idx_pair(images_path: Path, labels_path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read two idx files, plain or gzipped: uint8 images N x 28 x 28 and uint8 labels N, all below `classes`.

    Raises DataError if a file is damaged or the two do not belong together.
    """
    images = _read_idx(images_path, (28, 28))
    labels = _read_idx(labels_path, ())
    if len(images) != len(labels):
        counts = f"{len(images)} images and {len(labels)} labels"
        raise DataError(f"{images_path} and {labels_path} hold {counts}: fetch both again")
    _check_labels(labels, classes, labels_path)
    return images, labels


def _facts(dataset: str) -> DatasetFacts:
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown dataset {dataset!r}: {hint}known are {', '.join(DATASETS)}")
    return DATASETS[dataset]


def _root(path: str | Path | None) -> Path:
    """The user's path, or else the folder in which data sets are looked for and downloaded."""
    return Path(path if path is not None else os.environ.get("FASTROBUST_DATA") or "data").expanduser()


def _problem(dataset: str, place: Path) -> str | None:
    """Why a place cannot be the data set, judged by the names of its files; None if it can."""
    if not place.exists():
        return "does not exist"
    if dataset in ("mnist", "fashion_mnist"):
        absent = [name for names in _IDX_NAMES.values() for name in names if _idx_file(place, name) is None]
        return f"lacks {', '.join(absent)} (plain or .gz)" if absent else None
    if place.is_file() or (place / "train").is_dir():
        return None
    batches = [name for names in _BATCHES.values() for name in names]
    absent = [name for name in batches if not (place / name).is_file()]
    if dataset == "cifar10" and len(absent) < len(batches):
        return f"lacks {', '.join(absent)}" if absent else None
    archives = _archives(place)
    if dataset == "cifar10" and len(archives) > 1:
        return f"holds {len(archives)} archives: give the `path` of one"
    return None if archives else f"holds neither train/ nor a file *{', *'.join(_ARCHIVE_SUFFIXES)}"


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _archives(place: Path) -> list[Path]:
    """The tar files that make up the data set, in order; none if it is a folder of files."""
    if place.is_file():
        return [place]
    if (place / "train").is_dir():
        return []
    return sorted(file for file in place.iterdir() if file.name.endswith(_ARCHIVE_SUFFIXES))


def _download(dataset: str, root: Path) -> None:
    from fastrobust.models.torchvision_compat import import_torchvision

    datasets = import_torchvision().datasets
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
    try:
        getattr(datasets, kind)(str(root), download=True)
    except Exception as error:  # whatever the network, the server or the disk came up with
        raise DataError(
            f"{dataset} could not be downloaded to {root} ({type(error).__name__}: {error}). "
            "Check the network and the folder, or copy the data set there"
        ) from error


def _evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """Ascending indices of `limit` of `count` things, or of all of them."""
    taken = count if limit is None else min(limit, count)
    return np.arange(taken) * count // taken


def _check_memory(needed: int, what: str | Path) -> None:
    """Raise DataError if `needed` bytes exceed 80 % of the memory available, where the system tells that."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text()) if _MEMINFO.exists() else None
    available = 1024 * int(found[1]) if found else math.inf
    if needed > 0.8 * available:
        raise DataError(
            f"{what} needs {needed / 1e9:.3g} GB of memory, more than 80 % of the {available / 1e9:.3g} GB "
            "available: set a `limit`, lower the resolution or use a machine with more memory"
        )


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, plain or compressed; what goes wrong while it is read becomes a DataError."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        compressed = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}
        with compressed.get(start[:2], open)(path, "rb") as file:
            yield file
    except EOFError as error:
        raise DataError(f"{path} is truncated ({error}): fetch it again") from error
    except _DAMAGE as error:
        raise DataError(f"{path} is truncated or corrupt ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


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


def _read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """The uint8 array, N x item, in an idx file; takes memory for what is there, not for what it claims."""
    length = 8 + 4 * len(item)
    with _opened(path) as file:
        header = file.read(length)
        if len(header) < length:
            raise EOFError(f"{len(header)} bytes instead of a header of {length}")
        magic, count, *shape = struct.unpack(f">{2 + len(item)}I", header)
        if magic != 0x801 + len(item) or tuple(shape) != item or count == 0:
            raise ValueError(f"no idx file of N x {item} bytes: magic {magic:#x}, shape {(count, *shape)}")
        expected = count * math.prod(item)
        claim = f"its header claims {count} items = {expected} bytes"
        if expected > 1032 * path.stat().st_size:  # the most that gzip can compress
            raise EOFError(f"{claim}, the file has {path.stat().st_size}")
        _check_memory(expected, path)
        data = bytearray()
        while len(data) <= expected and (chunk := file.read(min(1 << 20, expected + 1 - len(data)))):
            data += chunk
        if len(data) < expected:
            raise EOFError(f"{claim}, {len(data)} follow")
        if len(data) > expected:
            raise ValueError(f"{claim}, more follow")
    return np.frombuffer(data, np.uint8).reshape(count, *item)


def _check_labels(labels: np.ndarray, classes: int, where: str | Path) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        found = f"label {labels[wrong[0]]} of image {wrong[0]}"
        raise DataError(f"{where}: {found} is outside 0..{classes - 1}: fetch the file again")


class _Member(NamedTuple):
    """A file in a folder or archive: its name there, what to call it in a message, and how to read it."""

    name: str
    where: str
    read: Callable[[], bytes]


def _folder_members(folder: Path) -> list[_Member]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): check the folder") from error

    tree = os.walk(folder, onerror=fail, followlinks=True)
    files = [Path(parent, name) for parent, _, names in tree for name in names]
    return [_Member(file.relative_to(folder).as_posix(), str(file), file.read_bytes) for file in files]


def _tar_members(path: Path) -> list[_Member]:
    """The files in a tar archive. A compressed archive is kept in memory; a plain one is read when needed."""
    members = []
    with _opened(path) as file:
        held = None
        if not isinstance(file, io.BufferedReader):
            held = io.BytesIO()
            while chunk := file.read(1 << 22):
                held.write(chunk)
                _check_memory(held.tell(), f"{path}, uncompressed,")
            held.seek(0)
        source = held or file
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for info in archive:
                name = info.name.removeprefix("./")
                where = f"{name} in {path}"
                if info.isreg():
                    read = partial(_read_at, held or path, info.offset_data, info.size)
                    members.append(_Member(name, where, read))
                elif (info.islnk() or info.issym()) and _is_image(name):
                    raise DataError(f"{where} is a link: make the archive with `tar -h --hard-dereference`")
            end = archive.offset
        source.seek(end)
        rest = source.read(1 << 20)
        if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):  # tarfile is silent about a damaged header
            raise ValueError(f"no end-of-archive mark at byte {end}")
    return members


def _read_at(source: io.BytesIO | Path, offset: int, size: int) -> bytes:
    if isinstance(source, io.BytesIO):
        return bytes(source.getbuffer()[offset : offset + size])
    with open(source, "rb") as file:
        file.seek(offset)
        return file.read(size)


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is forbidden")
        return super().find_class(module, name)


def _read_batches(batches: dict[str, _Member], split: str, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Images N x 32 x 32 x 3 and labels N from the python version's batch files of a split."""
    pixels, labels = [], []
    for name in _BATCHES[split]:
        if name not in batches:
            raise DataError(f"{source} lacks the CIFAR-10 batch {name}: fetch it again")
        where = batches[name].where
        try:
            batch = _BatchUnpickler(io.BytesIO(batches[name].read()), encoding="latin1").load()
            rows, marks = batch["data"], np.asarray(batch["labels"])
            if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
                raise ValueError(f"data is {rows.dtype} {rows.shape}, not uint8 N x 3072")
            if marks.dtype.kind not in "iu" or marks.shape != rows.shape[:1]:
                raise ValueError(f"labels are {marks.dtype} {marks.shape} for {len(rows)} images")
        except Exception as error:  # a damaged pickle can raise anything
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"{where} is damaged or no CIFAR-10 batch ({problem}): fetch it again") from error
        _check_labels(marks, 10, where)
        pixels.append(rows)
        labels.append(marks)
    planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(labels)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def _split_members(
    members: list[_Member], split: str, classes: tuple[str, ...] | None, source: str
) -> tuple[list[_Member], np.ndarray, tuple[str, ...]]:
    """The images of a split sorted by (class, file name), their labels, and the class names."""
    groups: dict[str, list[tuple[str, str, _Member]]] = {}  # split folder -> (class, file name, image)
    for member in members:
        folder, _, rest = member.name.partition("/")
        if "/" in rest and _is_image(rest):
            name, _, file = rest.partition("/")
            groups.setdefault(folder, []).append((name, file, member))
    sides = {side: [name for name in names if name in groups] for side, names in _SPLIT_FOLDERS.items()}
    if any(len(names) != 1 for names in sides.values()):
        found = ", ".join(sorted(groups)) or "no such folder"
        raise DataError(f"{source} must be {_LAYOUT}; it has images in {found}")
    train, test = ({name for name, _, _ in groups[folder]} for (folder,) in sides.values())
    expected = set(classes or train | test)
    if train != expected or test != expected:
        differ = ", ".join(sorted((train ^ expected) | (test ^ expected))[:5])
        raise DataError(f"{source}: train and test must have the same classes, but differ in {differ}")
    name, copies = Counter(member.name for member in members).most_common(1)[0]
    if copies > 1:
        raise DataError(f"{source}: {name} occurs {copies} times: remove the archives that overlap")
    index = {name: label for label, name in enumerate(sorted(expected))}
    chosen = sorted(groups[sides[split][0]])
    labels = np.array([index[name] for name, _, _ in chosen])
    return [member for _, _, member in chosen], labels, tuple(index)


def _decode_all(members: list[_Member], size: int, resize: bool) -> np.ndarray:
    """The images as one array N x size x size x 3, decoded in as many threads as there are processors."""
    shape = (len(members), size, size, 3)
    _check_memory(math.prod(shape), f"a set of {len(members)} images of {size} x {size} pixels")
    images = np.empty(shape, np.uint8)

    def decode(start: int) -> None:
        for i, member in enumerate(members[start : start + 64], start):
            images[i] = _decode(member, size, resize)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(0, len(members), 64)):
            pass
    return images


def _decode(member: _Member, size: int, resize: bool) -> Image.Image:
    """An upright RGB image (alpha dropped), size x size: resized and cropped to that, or required to be."""
    try:
        image = Image.open(io.BytesIO(member.read()), formats=_IMAGE_FORMATS)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # converting these would clip, not scale
            raise ValueError(f"its pixels, of mode {image.mode}, have more than 8 bits")
        if image.mode == "P":  # RGBA first, the way for palettes with transparency
            image = image.convert("RGBA")
        if image.mode != "RGB":
            image = image.convert("RGB")
        if resize and image.size != (size, size):
            width, height = (size * length // min(image.size) for length in image.size)
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + size, top + size))
        if image.size != (size, size):
            raise ValueError(f"it is {image.width} x {image.height} pixels, not {size} x {size}")
        return image
    except Exception as error:  # a damaged image can raise anything
        raise DataError(f"{member.where} is not a usable image ({error}): replace or remove it") from error
