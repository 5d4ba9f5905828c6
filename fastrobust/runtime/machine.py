"""What this machine is: processors, memory, versions, and the commit of the source tree."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastrobust import __version__
from fastrobust.runtime import limits
from fastrobust.runtime.errors import DataError


def check_memory(needed: int, what: str | Path) -> None:
    """Raise DataError if `needed` bytes exceed 80 % of the memory available, where the system tells that."""
    available = limits.available_memory()
    if needed > 0.8 * available:
        raise DataError(
            f"{what} needs {needed / 1e9:.3g} GB of memory, more than 80 % of the {available / 1e9:.3g} GB "
            "available: set a `limit`, lower the resolution or use a machine with more memory"
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
        "cores": limits.cores(),
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
    root = Path(__file__).resolve().parents[2]
    git, options = ["git", "-C", str(root)], {"stderr": subprocess.DEVNULL, "text": True, "timeout": 10}
    ask = lambda *words: subprocess.check_output([*git, *words], **options).strip()
    try:
        if Path(ask("rev-parse", "--show-toplevel")) != root:
            return None
        return ask("rev-parse", "--short=12", "HEAD") + "+" * bool(ask("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None
