"""The run directory: everything that a run leaves behind, written so that a file that is there is whole.

    runs/NAME/config.yaml          the resolved config
              environment.json     versions, hardware, commit
              metrics.jsonl        a line per epoch
              events.out.tfevents… the same for TensorBoard
              checkpoint.pt        all state, as plain tensors and JSON
              model.safetensors    the weights; its header holds what is needed to build the model
              summary.json         what came out

Files are replaced in one piece: written beside their place, flushed to disk, then renamed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastrobust import __version__, models
from fastrobust import config as config_module
from fastrobust.errors import FastrobustError, RunError, first_line
from fastrobust.schema import CHANNELS, Config

CONFIG, METRICS, CHECKPOINT, WEIGHTS, SUMMARY = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoint.pt",
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
        write_text(run / CONFIG, config.to_yaml())
        write_json(run / "environment.json", environment(config.device))
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
def explained(what: str):
    """Turns an operating system's error (full disk, no permission, …) into a RunError that starts with `what`."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{what}: {error.strerror if isinstance(error, OSError) else error}") from None


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file in one piece: whatever happens, `path` holds its old or its new content, whole. Raises RunError."""
    temporary = None
    try:
        with explained(f"{path} cannot be written (what was there before is untouched)"):
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_metrics(run: Path, history: list[dict]) -> None:
    write_text(run / METRICS, "".join(json.dumps(record) + "\n" for record in history))


def save_checkpoint(run: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """`tensors` and `facts` (anything JSON can hold) in one file that `torch.load(weights_only=True)` can read."""
    buffer = {"tensors": tensors, "facts": json.dumps(facts)}

    def write(file: BinaryIO) -> None:
        try:
            torch.save(buffer, file)
        except RuntimeError as error:  # torch's writer reports a full disk in its own words
            raise OSError(28, f"no space left, or the disk failed ({first_line(error)})") from None

    write_atomically(run / CHECKPOINT, write)


def load_checkpoint(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The last checkpoint, or None if the run was stopped before its first. Raises RunError for a damaged file."""
    path = run / CHECKPOINT
    if not path.exists():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return stored["tensors"], json.loads(stored["facts"])
    except Exception as error:
        raise RunError(f"{path} is damaged and cannot be resumed from: {first_line(error)}") from None


def save_weights(run: Path, model: torch.nn.Module, config: Config, classes: tuple[str, ...]) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    metadata = {"fastrobust": __version__, "config": json.dumps(config.to_dict()), "classes": json.dumps(classes)}
    content = save(tensors, metadata)
    write_atomically(run / WEIGHTS, lambda file: file.write(content))


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
        config = config_module.parse(json.loads(metadata["config"]), str(weights))
        classes = tuple(json.loads(metadata["classes"]))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
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
