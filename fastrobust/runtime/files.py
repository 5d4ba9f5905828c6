"""Files that are whole whenever they are there: written beside their place, flushed to disk, then renamed."""

import contextlib
import errno
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fastrobust.runtime.errors import RunError


@contextlib.contextmanager
def explained(what: str):
    """Turns an operating system's error (full disk, no permission, …) into a RunError that starts with `what`."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{what}: {error.strerror if isinstance(error, OSError) else error}") from None


def write_atomically(path: Path, write: Callable[[BinaryIO], None], previous: Path | None = None) -> None:
    """Write a file in one piece: whatever happens, `path` holds its old or its new content, whole. With `previous`, the old
    content is kept there; for a moment it is there alone. Raises RunError."""
    temporary = None
    try:
        with explained(f"{path} cannot be written (what was there before is untouched)"):
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            temporary = None
        _flush_folder(path.parent)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_writable(path: Path) -> None:
    """Raise RunError where a file could not be written in the end: said before the work, not after it."""
    with explained(f"{path} cannot be written"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.").close()


def _flush_folder(folder: Path) -> None:
    """Make the renames in a folder outlast a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def mistaken(start: bytes) -> str | None:
    """What a file is by its first bytes, where that is something else than data: so that nobody deletes a good file because
    it was called damaged, or keeps a web page for a data set."""
    if not start:
        return "is empty: fetch it again"
    if start[:15].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page: the download went wrong, fetch the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: run `git lfs pull`"
    return None


SAFETENSORS, TORCH, PICKLE = "a safetensors file", "a file of torch.save", "a pickle of Python objects"
CUT = "a damaged zip archive"
_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before version 1.6
_KINDS = {  # the first bytes, and at 4 in what begins with a length
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture", b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture", b"8BPS": "a Photoshop picture", b"%!PS": "an EPS picture", b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL": "a JPEG XL picture", b"\0\0\0\x0cjP": "a JPEG 2000 picture", b"\xffO\xffQ": "a JPEG 2000 picture",
    b"%PDF": "a PDF document", b"\x93NUMPY": "an array of NumPy", b"\x89HDF": "an HDF5 file", b"PK\3\4": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"\x1f\x8b": "a file compressed by gzip",
    b"\xfd7zXZ": "a file compressed by xz", b"BZh": "a file compressed by bzip2",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd",
}  # fmt: skip
_BOXES = {b"avi": "an AVIF picture", b"hei": "a HEIC picture", b"hev": "a HEIC picture", b"mif": "a HEIC picture"}


def kind_of(start: bytes) -> str | None:
    """What a file is, in words, by its first 512 bytes or all that it has; None where they do not tell."""
    start = start[:512]
    if start[6:9] == b"\0\0{":  # a length, and a header in JSON
        return SAFETENSORS
    if start[257:262] == b"ustar":
        return "a tar archive"
    if found := next((kind for mark, kind in _KINDS.items() if start.startswith(mark)), None):
        return found
    if start[4:8] == b"ftyp":
        return _BOXES.get(start[8:11], "a video")
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WEBP picture"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return TORCH if start[2:].startswith(_TORCH) else PICKLE
    if start[:1] == b"\x08" and start[1:2] < b"\x20" and start[2:3] in (b"\x12", b"\x1a", b":", b"B"):
        return "an ONNX network"
    text = start.decode(errors="ignore").strip()
    if len(text) > len(start) // 2 and all(c.isprintable() or c in "\t\r\n" for c in text):
        return f'a text file that begins "{text.splitlines()[0][:40]}"'
    return None


def kind_of_file(path: Path) -> str | None:
    """`kind_of` a file; of a zip archive by what is in it. Raises RunError if it cannot be read, is empty or a web page."""
    with explained(f"{path} cannot be read"), path.open("rb") as file:
        start = file.read(512)
    if problem := mistaken(start):
        raise RunError(f"{path} {problem}")
    if start[:2] != b"PK":
        return kind_of(start)
    try:
        with explained(f"{path} cannot be read"), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError):
        return CUT
    if all(name.endswith(".npy") for name in names):
        return "a file of NumPy's arrays"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program"
    return TORCH if any(name.endswith("/data.pkl") for name in names) else kind_of(start)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
