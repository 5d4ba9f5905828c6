"""File formats: idx files, archives, CIFAR-10 pickles and images -> arrays. Nothing in a file is written to disk or run.

Every problem with a file is a `DataError` that names it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import math
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastrobust.data.colours import DEEP, rgb
from fastrobust.runtime import limits
from fastrobust.runtime.errors import DataError
from fastrobust.runtime.files import kind_of, mistaken
from fastrobust.runtime.machine import check_memory

CIFAR_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_PICKLE_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_IMAGE_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF"]
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
HEAD, TAIL = 4096, 64  # bytes at the ends of a file that are looked at
_DAMAGE = (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError, OverflowError)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, plain or compressed; what goes wrong while it is read becomes a DataError."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if problem := mistaken(start):
            raise DataError(f"{path} {problem}")
        compressed = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}
        with compressed.get(start[:2], open)(path, "rb") as file:
            yield file
    except EOFError as error:
        raise DataError(f"{path} is truncated ({error}): fetch it again") from error
    except _DAMAGE as error:
        raise DataError(f"{path} is truncated or corrupt ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one. Raises DataError."""
    with opened(path) as file:
        content = file.read()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", "replace" if utf16 else "backslashreplace")


def read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """The uint8 array, N x item, in an idx file; takes memory for what is there, not for what it claims."""
    length = 8 + 4 * len(item)
    with opened(path) as file:
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
        check_memory(expected, path)
        data = bytearray()
        while len(data) <= expected and (chunk := file.read(min(1 << 20, expected + 1 - len(data)))):
            data += chunk
        if len(data) < expected:
            raise EOFError(f"{claim}, {len(data)} follow")
        if len(data) > expected:
            raise ValueError(f"{claim}, more follow")
    return np.frombuffer(data, np.uint8).reshape(count, *item)


def check_labels(labels: np.ndarray, classes: int, where: str | Path) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        found = f"label {labels[wrong[0]]} of image {wrong[0]}"
        from_1 = labels.min() == 1 and labels.max() == classes
        advice = "they count from 1, so subtract 1" if from_1 else "if the file is a published one, fetch it again"
        raise DataError(f"{where}: {found} is outside 0..{classes - 1}: {advice}")


class Member(NamedTuple):
    """A file in a folder or archive: its name there, what to call it in a message, and how to read it, or `length` bytes
    from `start`, which is negative if it counts from the end."""

    name: str
    where: str
    read: Callable[..., bytes]

    def ends(self) -> tuple[bytes, bytes]:
        """The first bytes and the last: without the rest where that is quicker."""
        if not isinstance(self.read, partial) or self.read.func is not read_at:
            content = self.read()
            return content[:HEAD], content[-TAIL:]
        return self.read(0, HEAD), self.read(-TAIL, TAIL)


def folder_members(folder: Path) -> list[Member]:
    """The files in a folder, and the folders in it that hold nothing, whose names end with a slash. Raises DataError."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): check the folder") from error

    files, empty = [], []
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        inside = Path(parent).relative_to(folder)  # as folders are named: `..` of a link is elsewhere
        if os.path.realpath(parent) in {os.path.realpath(folder / part) for part in inside.parents}:
            folders.clear()  # a link that leads back to a folder around it
            continue
        below, place = (os.path.join(path, "") if path.parts else "" for path in (inside, Path(parent)))
        # there may be millions: no Path for each
        files += [Member(printable(below + n), printable(place + n), partial(read_at, place + n, 0, None)) for n in names]
        empty += [] if names or folders else [Member(f"{printable(inside.as_posix())}/", str(Path(parent)), bytes)]
    return files + empty


def folder_of(member: Member) -> str | None:
    """The real folder of a file that lies in one; None for those in archives."""
    if isinstance(member.read, partial) and member.read.func is read_at and member.read.args[2] is None:
        return os.path.realpath(os.path.dirname(member.read.args[0]))
    return None


def printable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 become \\xNN."""
    return name if name.isprintable() else os.fsencode(name).decode("utf-8", "backslashreplace")


def archive_members(path: Path) -> list[Member]:
    """The files in a tar or zip archive. Raises DataError."""
    if not zipfile.is_zipfile(path):
        with opened(path) as file:
            kind = kind_of(file.read(HEAD))
        if kind not in (None, "a tar archive", "a zip archive"):
            raise DataError(f"{path} is {kind}, neither tar nor zip: unpack it, and set the path to the folder of images")
        return tar_members(path)
    with opened(path), zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
    for info in files:
        if info.flag_bits & 1:
            raise DataError(f"{path}: {info.filename} is encrypted: unpack it with its password, and give the folder")
        if info.compress_type not in _ZIP_METHODS:
            method = zipfile.compressor_names.get(info.compress_type, f"method {info.compress_type}")
            raise DataError(
                f"{path}: {info.filename} is packed with {method}, which cannot be read: unpack it, and give the folder"
            )
    names = [info.filename for info in files]
    if not any("/" in name for name in names):  # some programs of Windows write backslashes
        return [
            Member(name.replace("\\", "/"), f"{name} in {path}", partial(_read_zipped, path, name))
            for name in names
            if not name.endswith("\\")
        ]
    return [Member(name.removeprefix("./"), f"{name} in {path}", partial(_read_zipped, path, name)) for name in names]


def _read_zipped(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (*_DAMAGE, EOFError, RuntimeError) as error:
        raise DataError(
            f"{name} in {path} is damaged ({error}): fetch the archive again, or leave it out: data.skip_corrupt=true"
        ) from error


def tar_members(path: Path, nested: bool = False) -> list[Member]:
    """The files in a tar archive. With `nested`, the tars in it are folders, and the files are those in them. A compressed
    archive is kept in memory; a plain one is read when needed."""
    with opened(path) as file:
        held = None
        if not isinstance(file, io.BufferedReader):
            held = io.BytesIO()
            while chunk := file.read(1 << 22):
                held.write(chunk)
                check_memory(held.tell(), f"{path}, uncompressed,")
            held.seek(0)
        source = held or file
        found = _tar_entries(source, str(path))
        if nested:
            tars = [entry for entry in found if entry[0].endswith(".tar")]
            inner = [(t, _tar_entries(source, f"{t[0]} in {path}", *t[1:])) for t in tars]
            found = [(f"{t[0][:-4]}/{name}", *where) for t, entries in inner for name, *where in entries]
    return [Member(name, f"{name} in {path}", partial(read_at, held or path, *where)) for name, *where in found]


def _tar_entries(source: IO[bytes], what: str, start: int = 0, size: int | None = None) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in the tar at `start`, which takes `size` bytes, or the rest of the source."""
    entries = []
    limit = math.inf if size is None else start + size
    source.seek(start)
    with tarfile.open(fileobj=source, mode="r:") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isreg():
                entries.append((name, info.offset_data, info.size))
                if info.offset_data + info.size > limit:
                    raise ValueError(f"{name} in {what} goes on after the end of that archive")
            elif (info.islnk() or info.issym()) and is_image(name):
                raise DataError(f"{name} in {what} is a link: make the archive with `tar -h --hard-dereference`")
        end = archive.offset
    source.seek(end)
    rest = source.read(int(max(0, min(1 << 20, limit - end))))
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):  # tarfile is silent about a damaged header
        raise ValueError(f"{what}: no end-of-archive mark at byte {end}")
    return entries


def read_at(source: io.BytesIO | str, offset: int, size: int | None, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes, or all, from `start` of what lies at `offset` and takes `size` bytes, or all that the file has."""
    if size is None:
        size = os.stat(source).st_size if start < 0 else None
    if size is not None:
        start = max(0, start + size) if start < 0 else start
        length = size - start if length is None else min(length, size - start)
    if isinstance(source, io.BytesIO):
        return bytes(source.getbuffer()[offset + start : offset + start + length])
    with open(source, "rb") as file:
        file.seek(offset + start)
        return file.read() if length is None else file.read(length)


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is forbidden")
        return super().find_class(module, name)


def read_batches(
    batches: dict[str, Member], names: list[str], source: str, key: str = "labels", classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Images N x 32 x 32 x 3 and labels N from batch files of the python version of CIFAR-10, or of CIFAR-100, whose labels
    have another key."""
    pixels, labels = [], []
    for name in names:
        if name not in batches:
            raise DataError(f"{source} lacks the CIFAR-{classes} batch {name}: fetch it again")
        where = batches[name].where
        try:
            batch = unpickled(batches[name])
            rows, marks = batch["data"], np.asarray(batch[key])
            if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
                raise ValueError(f"data is {rows.dtype} {rows.shape}, not uint8 N x 3072")
            if marks.dtype.kind not in "iu" or marks.shape != rows.shape[:1]:
                raise ValueError(f"labels are {marks.dtype} {marks.shape} for {len(rows)} images")
        except Exception as error:  # a damaged pickle can raise anything
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"{where} is damaged or no CIFAR-{classes} batch ({problem}): fetch it again") from error
        check_labels(marks, classes, where)
        pixels.append(rows)
        labels.append(marks)
    planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(labels)


def unpickled(member: Member) -> Any:
    """What a pickle of arrays and plain values holds. A damaged one can raise anything."""
    return _BatchUnpickler(io.BytesIO(member.read()), encoding="latin1").load()


def is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


class Unusable(DataError):
    """Images that cannot be decoded: all of them, of which the message has the first ten."""

    def __init__(self, errors: list[DataError]):
        self.errors = [str(error) for error in errors]
        super().__init__(first_ten(self.errors))


def first_ten(lines: list[str]) -> str:
    return "\n".join(lines[:10]) + (f"\nand {len(lines) - 10} more" if len(lines) > 10 else "")


def decode_all(
    members: list[Member], size: int, resize: bool, channels: int = 3, bad: dict[int, DataError] | None = None
) -> np.ndarray:
    """The images as one array N x size x size x channels, decoded in as many threads as there are processors. Images that
    cannot be decoded are put into `bad` under their numbers, or raised together as Unusable if that is None."""
    shape = (len(members), size, size, channels)
    check_memory(math.prod(shape), f"a set of {len(members)} images of {size} x {size} pixels")
    images = np.empty(shape, np.uint8)

    def decode(start: int) -> dict[int, DataError]:
        found = {}
        for i, member in enumerate(members[start : start + 64], start):
            try:
                image = _decode(member, size, resize)
                images[i] = image if channels == 3 else np.asarray(image.convert("L"))[..., None]
            except DataError as error:
                found[i] = error
        return found

    with ThreadPoolExecutor(limits.cores()) as pool:
        found = {i: error for part in pool.map(decode, range(0, len(members), 64)) for i, error in part.items()}
    if found and bad is None:
        raise Unusable(list(found.values()))
    if bad is not None:
        bad |= found
    return images


def _decode(member: Member, size: int, resize: bool) -> Image.Image:
    """An upright RGB image (alpha dropped), size x size: resized and cropped to that, or required to be."""
    image = open_upright(member)
    try:
        if resize and image.size != (size, size):
            width, height = (size * length // min(image.size) for length in image.size)
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + size, top + size))
        if image.size != (size, size):
            raise ValueError(f"it is {image.width} x {image.height} pixels, not {size} x {size}")
        return image
    except Exception as error:  # a strange image can raise anything
        raise unusable(member.where, error) from error


def open_upright(member: Member) -> Image.Image:
    """The image, decoded whole: 8-bit RGB, turned as its EXIF data say, alpha dropped. Raises DataError."""
    try:
        content = member.read()
    except OSError as error:
        raise DataError(
            f"{member.where} cannot be read ({error.strerror or error}): check the disk and permissions"
        ) from error
    if problem := mistaken(content[:64]):
        raise DataError(f"{member.where} {problem}")
    try:
        image = Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS)
        if image.format == "PNG":  # Pillow decodes its pixels without a look at their checksums
            Image.open(io.BytesIO(content), formats=["PNG"]).verify()
        image.load()  # before the EXIF data are read: there a damaged picture would be passed over
        with contextlib.suppress(Exception):  # a good picture may have an odd EXIF block: then it is taken as it lies
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(DEEP) or bits_of(content) > 8:  # converting these would clip, not scale
            raise unusable(member.where, "its pixels have more than 8 bits", CONVERT)
        return image if image.mode == "RGB" else rgb(image)
    except (MemoryError, DataError):
        raise
    except UnidentifiedImageError as error:  # Pillow tells the address of an object
        kind = kind_of(content[:512])
        known = kind is None or any(f"a {name} picture" == kind for name in _IMAGE_FORMATS)
        told = "cannot identify image file" + ("" if known else f": it is {kind}")
        raise unusable(member.where, told, *([CONVERT] if not known and "picture" in kind else [])) from error
    except Exception as error:  # a damaged image can raise anything
        raise unusable(member.where, error) from error


def bits_of(content: bytes) -> int:
    """Of a sample of a PNG file; 8 for other files. Pillow keeps the upper 8 of 16 in RGB without a word."""
    return content[24] if content.startswith(b"\x89PNG") and len(content) > 24 else 8


REPLACE = "put a good copy in its place (a run that was begun goes on with --resume)"
CONVERT = "convert it to PNG or JPEG with 8 bits"


def unusable(where: str, problem: Exception | str, advice: str = REPLACE) -> DataError:
    return DataError(f"{where} is not a usable image ({problem}): {advice}, or leave it out: data.skip_corrupt=true")
