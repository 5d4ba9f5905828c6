"""What a step of each method costs on this machine: seconds, measured in turn in one process, and memory."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks import method_setting as setting
from benchmarks.step import images
from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data.batch import Batch
from fastrobust.data.loaders.resident import Resident
from fastrobust.runtime import distributed, machine
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import write_json
from fastrobust.train.methods.standard import Standard
from fastrobust.train.step import build

EXAMPLES = 50_000  # training images, where `data.limit` is not set: fgsm_pgi has a state for each
REPETITIONS = 15
STEPS = 3  # of which memory is the peak


def images_of(config: Config, device: torch.device) -> Resident:
    return Resident(images(config.data.limit or EXAMPLES, config.phases[0].resolution), device)


def batch_of(config: Config, loader: Resident) -> Batch:
    return next(loader.batches(0, 0, config.phases[0].batch_size, 0, 1))


def measure_all(scale: str, methods: list[str], folder: Path, device: str) -> None:
    """Times the steps with which the runs of equal epochs begin, on random images; writes `costs_DEVICE.json`. On a CPU one
    thread's processor time counts, which other work beside it changes little. Raises FastrobustError."""
    place = distributed.pick_device(device)
    clock = time.perf_counter
    if place.type == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    configs = {method: setting.base(scale, method) for method in dict.fromkeys((setting.REFERENCE, *methods))}
    memory = {method: peak_of(config, device) for method, config in configs.items()}
    usual = configs[setting.REFERENCE]
    loader = images_of(usual, place)
    batch = batch_of(usual, loader)
    steps = {method: build(config, loader, place) for method, config in configs.items()}
    rows = {method: lambda step=step: step(batch) for method, step in steps.items()}
    times = measure.interleaved(rows, place, repetitions=REPETITIONS, warm_up=2, clock=clock)
    times = {method: [t / configs[method].replays for t in times[method]] for method in times}  # of an update
    facts = machine.environment(device)
    found = {
        "scale": scale,
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],  # of the last minute, this process included
        "batch_size": len(batch.labels),
        "repetitions": REPETITIONS,
        "clock": clock.__name__,
        "methods": {
            method: {
                "seconds_per_update": measure.summary(t),
                "over_fgsm": measure.ratio(t, times[setting.REFERENCE]),
                "peak_memory": memory[method],
            }
            for method, t in times.items()
        },
        **facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "_", f"{facts['hardware']['device']} {facts['hardware']['threads']}threads").strip("_").lower()
    write_json(folder / f"costs_{slug}.json", found)


def peak_of(config: Config, device: str) -> int:
    """Bytes that a training takes at most, data and what torch itself needs left out: weights, optimiser, state,
    activations. Measured in a process of its own, where freed memory goes back at once. Raises FastrobustError."""
    command = [sys.executable, "-m", "benchmarks.method_costs", config.model_dump_json(), device]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, cwd=setting.ROOT, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
        raise FastrobustError(f"the memory of {config.method.name} was not measured: {last[0]}")
    return int(done.stdout.splitlines()[-1])


def peak(config: Config, device: torch.device) -> int:
    loader = images_of(config, device)
    batch = batch_of(config, loader)
    first = build(config.model_copy(update={"method": Standard(name="standard")}), loader, device)
    first(batch)  # what torch needs once
    del first
    gc.collect()
    used = memory_of_gpu if device.type == "cuda" else memory_of_process
    before = used(reset=True)
    step = build(config, loader, device)
    for _ in range(STEPS):
        step(batch)
    return used() - before


def memory_of_gpu(reset: bool = False) -> int:
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def memory_of_process(reset: bool = False) -> int:
    """The most that this process held at once since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    print(peak(reading.parse(json.loads(sys.argv[1]), "the config"), distributed.pick_device(sys.argv[2])))
