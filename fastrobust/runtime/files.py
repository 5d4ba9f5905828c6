"""Files that are whole whenever they are there: written beside their place, flushed to disk, then renamed."""

import contextlib
import errno
import json
import os
import tempfile
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


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
