"""The run directory: everything that a run leaves behind, written so that a file that is there is whole.

    runs/NAME/config.yaml          the resolved config
              environment.json     versions, hardware, commit
              metrics.jsonl        a line per epoch
              events.out.tfevents… the same for TensorBoard
              checkpoint.pt        all state, as plain tensors and JSON
              checkpoint.previous.pt  the one before
              model.safetensors    the weights; its header holds what is needed to build the model
              model.live.safetensors  with `averaging` and no `selection`: the trained weights, model.safetensors are means
              evaluations/         what attacks did to each image (`evaluation/results.py`); interrupted ones go on there
              summary.json         what came out
              images.txt.gz        the files that it trains on, in their order, where each image has one
              images.sha256        a digest of its prepared training images, of which some are held out
              skipped_images.txt   those that it leaves out, and why (`data.skip_corrupt`)

Files are replaced in one piece: written beside their place, flushed to disk, then renamed. A checkpoint ends with its own
checksum; where that does not fit, the one before is used.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import math
import os
import shlex
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.config.sources import changed, sources
from fastrobust.runtime.errors import RunError, first_line
from fastrobust.runtime.files import explained, write_atomically, write_json, write_text
from fastrobust.runtime.machine import environment

CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, PREVIOUS, WEIGHTS, LIVE, SUMMARY = FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "model.safetensors",
    "model.live.safetensors",
    "summary.json",
)
IMAGES, SKIPPED, DIGEST = "images.txt.gz", "skipped_images.txt", "images.sha256"


def taken(run: Path) -> RunError:
    again = f"--resume {shlex.quote(str(run))}"
    return RunError(f"{run} holds a run already; continue it with `{again}`, or choose another with `name=NAME`")


def create(config: Config) -> Path:
    """Make the directory of a new run. Raises RunError if one is there already, or cannot be made."""
    run = Path(config.output) / config.name
    with explained(f"the run directory {run} cannot be made"):
        run.mkdir(parents=True, exist_ok=True)
    with held(run), explained(f"the run directory {run} cannot be made"):  # of two processes one makes it
        if (run / CONFIG).exists():
            raise taken(run)
        code = sources(reading.flatten(config.to_dict()).values())
        write_json(run / ENVIRONMENT, environment(config.device) | ({"code": code} if code else {}))
        write_text(run / CONFIG, config.to_yaml())  # last: where it is, there is a run to resume
    return run


def as_lines(names: Sequence[str]) -> list[str]:
    """Files' names as text of one line each, whatever is in them."""
    return [name.encode(errors="backslashreplace").decode().replace("\n", "\\n") for name in names]


def write_images(run: Path, names: Sequence[str], skipped: dict[str, Sequence[str]], digest: str | None = None) -> None:
    """The files that a run trains on or the digest of its prepared images, and those of each split that it leaves out."""
    if digest:
        write_text(run / DIGEST, digest + "\n")
    if names:
        content = gzip.compress("\n".join(as_lines(names)).encode(), mtime=0)
        write_atomically(run / IMAGES, lambda file: file.write(content))
    if lines := [f"{split}: {line}" for split, found in skipped.items() for line in found]:
        write_text(run / SKIPPED, "\n".join(lines) + "\n")


def read_images(run: Path) -> list[str] | None:
    """The files that a run trains on, or None where it has no list. Raises RunError."""
    if not (run / IMAGES).exists():
        return None
    try:
        return gzip.decompress((run / IMAGES).read_bytes()).decode().split("\n")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RunError(
            f"{run / IMAGES} is damaged ({first_line(error)}): delete it, and the images are not compared"
        ) from None


def read_digest(run: Path) -> str | None:
    """The digest of a run's prepared training images, or None where it has none. Raises RunError."""
    with explained(f"{run / DIGEST} cannot be read"):
        return (run / DIGEST).read_text().strip() if (run / DIGEST).exists() else None


def open_run(run: str | Path) -> tuple[Path, Config]:
    """An existing run directory and its config. Raises RunError."""
    run = Path(run)
    if not run.exists():
        raise RunError(f"{run} does not exist: no run was saved there")
    if not (run / CONFIG).is_file():
        raise RunError(f"{run} is not a run directory: it has no {CONFIG}")
    with explained(f"{run / CONFIG} cannot be read"):
        text = (run / CONFIG).read_text(encoding="utf-8")
    return run, reading.parse(reading.read_yaml(text, str(run / CONFIG)), str(run / CONFIG))


def warn_of_changed_code(run: Path, config: Config) -> None:
    """Say which of the user's own parts have other code now than when the run was begun."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        before = json.loads((run / ENVIRONMENT).read_text()).get("code", {})
        for line in changed(before, sources(reading.flatten(config.to_dict()).values())):
            print(f"warning: {run}: {line}", file=sys.stderr, flush=True)


def change(run: Path, config: Config, lines: list[str]) -> None:
    """Put a changed config in the place of a run's. The lines, which say what each key was before, stand above it as
    comments, below those of earlier changes. Raises RunError."""
    with held(run):
        kept = [line for line in (run / CONFIG).read_text(encoding="utf-8").splitlines() if line.startswith("# changed")]
        kept += [f"# changed when the run was resumed: {line}" for line in lines]
        write_text(run / CONFIG, "\n".join([*kept, config.to_yaml()]))


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Inside, this process alone trains the run, and what a killed one left half-written is gone. Raises RunError."""
    with explained(f"{run} cannot be opened"):
        handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
        except BlockingIOError:
            raise RunError(f"{run} is being trained by another process: wait for it, or stop it first") from None
        except OSError:  # a file system without locks
            pass
        for pattern in (*(f".{name}.*" for name in FILES), "evaluations/.*.safetensors.*"):
            for left in run.glob(pattern):
                with contextlib.suppress(OSError):
                    left.unlink()
        yield
    finally:
        os.close(handle)


def write_metrics(run: Path, history: list[dict]) -> None:
    """A line of JSON per epoch. A number that is none (a loss of fp16, whose update was skipped) becomes null."""

    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    lines = [json.dumps({key: plain(value) for key, value in record.items()}) + "\n" for record in history]
    write_text(run / METRICS, "".join(lines))


class _Hashed:
    """A file that keeps the SHA-256 checksum of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sum, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data) -> int:
        self.sum.update(data)
        return self.file.write(data)


def _seal(digest: str) -> bytes:
    """The end of a checkpoint: the length of the zip file's comment and the comment, which is the checksum of the file as it
    was without one (that is, with a length of 0)."""
    comment = f"sha256 {digest}".encode()
    return struct.pack("<H", len(comment)) + comment


def save_checkpoint(run: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """`tensors` and `facts` (anything JSON can hold) in one file that `torch.load(weights_only=True)` can read. The
    checkpoint before is kept beside it."""
    buffer = {"tensors": tensors, "facts": json.dumps(facts)}

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        try:
            torch.save(buffer, hashed)
        except RuntimeError as error:  # torch's writer reports a full disk in its own words
            raise OSError(errno.ENOSPC, f"no space left, or the disk failed ({first_line(error)})") from None
        file.seek(-2, os.SEEK_END)
        file.write(_seal(hashed.sum.hexdigest()))

    write_atomically(run / CHECKPOINT, write, run / PREVIOUS)


def load_checkpoint(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The last checkpoint, or with a warning the one before if the last is torn; None if the run was stopped before its
    first. Raises RunError when there are only damaged ones."""
    last, previous = files = run / CHECKPOINT, run / PREVIOUS
    if not any(file.exists() for file in files):
        return None
    trouble = {}
    for file in files:
        try:
            found = _read_checkpoint(file)
            break
        except Exception as error:  # a damaged file can raise anything
            trouble[file] = f"{file} is " + (f"damaged ({first_line(error)})" if file.exists() else "missing")
    else:
        told = "; ".join(trouble.values())
        raise RunError(f"{told}: the run cannot be resumed. To start from the beginning, delete what is damaged")
    if file == previous:
        print(f"warning: {trouble[last]}; going on from the one before, {previous}", file=sys.stderr)
        with contextlib.suppress(OSError):  # so that it never takes the place of the whole one
            os.replace(last, run / "checkpoint.damaged.pt")
    return found


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Raises ValueError if the checksum does not fit, and anything at all for a file that was made to harm."""
    length, digest = len(_seal(64 * "0")), hashlib.sha256()
    left = path.stat().st_size - length
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(bytes(2))
        if left or file.read() != _seal(digest.hexdigest()):
            raise ValueError("its checksum does not fit: it was cut short or changed")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    tensors, facts = stored["tensors"], json.loads(stored["facts"])
    if not all(isinstance(t, torch.Tensor) for t in tensors.values()) or not isinstance(facts, dict):
        raise ValueError("it does not hold tensors and facts")
    return tensors, facts
