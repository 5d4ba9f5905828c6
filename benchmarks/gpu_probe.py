"""What the GPU machine is, in seconds: versions, device, driver, whether a graph can be captured and counts right.

python -m benchmarks.gpu_probe        # the first part of benchmarks.gpu_report
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["torch", "torchvision", "numpy", "PIL", "yaml", "rich", "safetensors", "tensorboard", "pydantic"]
OFFICIAL = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


def write(file: Path, value: Any) -> None:
    """In one piece; without the package, which may not be usable here."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)


def data_name(place: Path) -> str:
    """What the images are called in all results: only the official files are CIFAR-10 without more words."""
    name = place.resolve().name
    if name in OFFICIAL:
        return "CIFAR-10"
    return f"CIFAR-10 (JPEG), {name}" if "jp" in name.lower() else f"CIFAR-10 from {name}"


def sources() -> str:
    """A digest of the code, for machines to which the history does not come along."""
    digest = hashlib.sha256()
    for file in sorted(f for room in ("fastrobust", "benchmarks", "configs") for f in (ROOT / room).rglob("*")):
        if file.suffix in (".py", ".yaml"):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def main() -> int:
    """Writes result.json in the working folder, anew with each fact."""
    found: dict[str, Any] = {"sources": sources(), "python": sys.version.split()[0], "cores": os.cpu_count()}
    found["missing"] = [name for name in NEEDED if importlib.util.find_spec(name) is None]

    def keep(**facts: Any) -> None:
        found.update(facts)
        write(Path("result.json"), found)
        print(", ".join(f"{key}: {value}" for key, value in facts.items()), flush=True)

    keep()
    import torch

    keep(torch=torch.__version__, cuda=torch.version.cuda, gpu=torch.cuda.is_available())
    for package in ("triton", "torchvision", "pydantic"):
        with contextlib.suppress(Exception):  # of a package that does not fit this torch, its import can raise anything
            keep(**{package: __import__(package).__version__})
    if not found["gpu"] or found["missing"]:
        return 0
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / 1e9
    keep(device=name, memory_gb=round(memory, 1), simulated="simulated" in name.lower())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        keep(driver_clock_power=subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip())
    try:
        from fastrobust.data import sets
        from fastrobust.runtime import machine

        keep(commit=machine.environment("cuda")["commit"])
        keep(data=data_name(sets.locate("cifar10")))
    except Exception as error:
        keep(data_error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    x = torch.zeros(1024, device="cuda")
    x += 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    right = bool((x.cpu() == 4).all())
    keep(captured=True, counts_right=right, simulated=found["simulated"] or not right)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    keep(bf16_matmul_tflops=round(10 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
