"""Where the time of a training step goes: kernels (or, on a CPU, operators) by the time they take themselves, and the share
of the wall time in which none runs.

    python -m benchmarks.profile --method fgsm --json benchmarks/results/gpu/profile.json
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.step import METHODS, cifar_config, images
from fastrobust.data.loaders.resident import Resident
from fastrobust.runtime import distributed
from fastrobust.runtime.files import write_json
from fastrobust.train.step import build

ROWS = 15


def kernels(events: list, cuda: bool) -> list:
    """Those that take time themselves: on a GPU the kernels and copies, without the annotations that span them (an
    optimiser's step, say)."""
    return [e for e in events if not cuda or (e.device_type == DeviceType.CUDA and not e.is_user_annotation)]


def main() -> None:
    p = measure.arguments(__doc__.split(":")[0])
    p.add_argument("--method", choices=list(METHODS), default="fgsm")
    p.add_argument("--engine", default="auto")
    p.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp16 on a GPU, fp32 on a CPU")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--steps", type=int, help="default: 20 on a GPU, 2 on a CPU")
    arguments = p.parse_args()
    device, batch_size = distributed.pick_device(arguments.device), arguments.batch_size
    cuda = device.type == "cuda"
    steps = arguments.steps or (20 if cuda else 2)
    precision = arguments.precision or ("fp16" if cuda else "fp32")
    config = cifar_config(arguments.method, arguments.engine, precision, batch_size)
    loader = Resident(images(4 * batch_size), device)
    step = build(config, loader, device)
    batch = next(loader.batches(0, 0, batch_size, 0, 1))
    for _ in range(5 if cuda else 1):
        step(batch)
    measure.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step(batch)
    measure.synchronize(device)
    wall = (time.perf_counter() - began) / steps
    result = {
        "model": config.model.name,
        "method": arguments.method,
        "engine": step.engine,
        "precision": precision,
        "batch_size": batch_size,
        "milliseconds_per_step": wall * 1e3,  # measured without the profiler
        "busy_milliseconds_per_step": None,
        "top": [],
    }
    if arguments.json:  # what is known, should the profiler crash
        write_json(Path(arguments.json), result)
    if cuda and "Simulated" in torch.cuda.get_device_name(device):  # no kernel runs there, and torch's profiler crashes
        return measure.report("profile", ["ms per step"], [[f"{wall * 1e3:.3f}"]], result, arguments.json, device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU] if cuda else [ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step(batch)
        measure.synchronize(device)
    own = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    events = sorted(kernels(profiler.key_averages(), cuda), key=own, reverse=True)
    busy = sum(map(own, events)) / steps / 1e6
    rows = [
        {"name": e.key, "milliseconds": own(e) / steps / 1e3, "calls": e.count / steps, "share": own(e) / steps / 1e6 / busy}
        for e in events[:ROWS]
    ]
    result |= {"busy_milliseconds_per_step": busy * 1e3, "idle_share": max(0.0, 1 - busy / wall), "top": rows}
    table = [[r["name"][:70], f"{r['milliseconds']:.3f}", f"{r['calls']:.1f}", f"{r['share']:.1%}"] for r in rows]
    table.append(["all", f"{busy * 1e3:.3f}", "", f"{1 - result['idle_share']:.1%} of {wall * 1e3:.3f} ms of wall time"])
    measure.report("profile", ["kernel or operator", "ms per step", "calls", "share"], table, result, arguments.json, device)


if __name__ == "__main__":
    main()
