"""The run directory: everything that a run leaves behind, written so that a file that is there is whole.

    runs/NAME/config.yaml          the resolved config
              environment.json     versions, hardware, commit
              metrics.jsonl        a line per epoch
              events.out.tfevents… the same for TensorBoard
              checkpoint.pt        all state, as plain tensors and JSON
              checkpoint.previous.pt  the one before
              model.safetensors    the weights; its header holds what is needed to build the model
              summary.json         what came out

Files are replaced in one piece: written beside their place, flushed to disk, then renamed. A checkpoint ends with its own
checksum; where that does not fit, the one before is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastrobust import __version__, models
from fastrobust import config as config_module
from fastrobust.errors import FastrobustError, RunError, first_line
from fastrobust.schema import CHANNELS, Config

CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, PREVIOUS, WEIGHTS, SUMMARY = FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "model.safetensors",
    "summary.json",
)


def create(config: Config) -> Path:
    """Make the directory of a new run. Raises RunError if one is there already, or cannot be made."""
    run = Path(config.output) / config.name
    if (run / CONFIG).exists():
        raise RunError(f"{run} holds a run already; continue it with `--resume {run}`, or choose another with `name=NAME`")
    with explained(f"the run directory {run} cannot be made"):
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / ENVIRONMENT, environment(config.device))
        write_text(run / CONFIG, config.to_yaml())  # last: where it is, there is a run to resume
    return run


def open_run(run: str | Path) -> tuple[Path, Config]:
    """An existing run directory and its config. Raises RunError."""
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise RunError(f"{run} is not a run directory: it has no {CONFIG}")
    with explained(f"{run / CONFIG} cannot be read"):
        text = (run / CONFIG).read_text(encoding="utf-8")
    return run, config_module.parse(config_module.read_yaml(text, str(run / CONFIG)), str(run / CONFIG))


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
        for name in FILES:
            for left in run.glob(f".{name}.*"):
                with contextlib.suppress(OSError):
                    left.unlink()
        yield
    finally:
        os.close(handle)


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


def _flush_folder(folder: Path) -> None:
    """Make the renames in a folder outlast a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


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
    last, previous = run / CHECKPOINT, run / PREVIOUS
    if not last.exists() and not previous.exists():
        return None
    problem = "is missing"
    if last.exists():
        try:
            return _read_checkpoint(last)
        except Exception as error:  # a damaged file can raise anything
            problem = f"is damaged ({first_line(error)})"
            if not previous.exists():
                raise RunError(
                    f"{last} is damaged and cannot be resumed from: {first_line(error)}. "
                    "To start from the beginning, delete it"
                ) from None
    try:
        found = _read_checkpoint(previous)
    except Exception as error:
        raise RunError(
            f"{last} {problem}, and {previous} is damaged too ({first_line(error)}): the run cannot be resumed. "
            "To start from the beginning, delete both"
        ) from None
    print(f"warning: {last} {problem}; going on from the one before, {previous}", file=sys.stderr)
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


def save_weights(run: Path, model: torch.nn.Module, config: Config, classes: tuple[str, ...]) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    metadata = {"fastrobust": __version__, "config": json.dumps(config.to_dict()), "classes": json.dumps(classes)}
    metadata["sha256"] = weights_checksum(tensors, metadata)
    content = save(tensors, metadata)
    write_atomically(run / WEIGHTS, lambda file: file.write(content))


def weights_checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of the weights, and of the config and classes in their file's header; safetensors has none of its own."""
    digest = hashlib.sha256(f"{metadata['config']}\n{metadata['classes']}".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: str | Path) -> tuple[torch.nn.Module, Config, tuple[str, ...]]:
    """(model in eval mode on the CPU, config, class names) from a run directory or a .safetensors file. RunError."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        hint = f"; the run is not finished: `--resume {path}`" if (path / CONFIG).is_file() else ""
        raise RunError(f"there are no weights at {weights}{hint}")
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("sha256", "absent") not in ("absent", weights_checksum(tensors, metadata)):
            raise ValueError("its checksum does not fit: it was changed after it was written")
        config = config_module.parse(json.loads(metadata["config"]), str(weights))
        classes = tuple(json.loads(metadata["classes"]))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{weights} is damaged: {error}") from None
    except KeyError as error:
        raise RunError(f"{weights} was not written by fastrobust: its header has no {error}") from None
    model = build_model(config, classes)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"the weights in {weights} do not fit {config.model.name}: {error}") from None
    return model.eval(), config, classes


def load(run: str | Path) -> torch.nn.Module:
    """The trained model of a run directory or .safetensors file, ready to use: in eval mode, on the CPU, normalisation
    inside. Takes images in [0, 1], float N x C x H x W, and gives logits N x classes. Raises RunError."""
    try:
        return read_weights(run)[0]
    except FastrobustError as error:
        raise RunError(str(error)) from None


def build_model(config: Config, classes: tuple[str, ...]) -> torch.nn.Module:
    channels = CHANNELS[config.data.dataset]
    return models.create(
        config.model.name, channels=channels, classes=len(classes), mean=config.model.mean, std=config.model.std
    )


def environment(device: str) -> dict[str, Any]:
    """Versions, hardware and the commit that a result belongs to."""
    versions = {"python": platform.python_version(), "fastrobust": __version__, "torch": torch.__version__}
    for package in ("torchvision", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cuda = torch.cuda.is_available() and device != "cpu"
    hardware = {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, with `+` if it has changes; None when installed."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10)
        if top.returncode or Path(top.stdout.strip()) != root:
            return None
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None
