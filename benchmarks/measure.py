"""What the benchmarks share: interleaved timing, the hardware it was done on, a table and one line of JSON."""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastrobust.runtime import machine, memory
from fastrobust.runtime.files import write_json


def arguments(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", default="auto")
    p.add_argument("--quick", action="store_true", help="fewer rows and repetitions: minutes on two CPU cores")
    p.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    return p


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    rows: dict[str, Callable[[], Any]],
    device: torch.device,
    *,
    repetitions: int,
    inner: int = 1,
    warm_up: int = 1,
    lead: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every row: each repetition times all rows in turn (`inner` calls each), so that a machine that
    slows down slows all of them down. Warm-up calls are not timed, nor are the first `lead` of a row's turn (they use up
    what was made ready while other rows had theirs). clock: `time.process_time` counts what this process was given."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for name, call in rows.items():
        for _ in range(warm_up):
            call()
        synchronize(device)
        print(f"warmed up: {name}", file=sys.stderr, flush=True)
    for _ in range(repetitions):
        for name, call in rows.items():
            for _ in range(lead):
                call()
            synchronize(device)
            began = clock()
            for _ in range(inner):
                call()
            synchronize(device)
            times[name].append((clock() - began) / inner)
    return times


def with_memory(call: Callable[[], None], kept: bool) -> Callable[[], None]:
    """The call with `memory.keep_freed`, as the train command has it, or with what glibc comes to by itself."""

    def run() -> None:
        if kept:
            memory.keep_freed(0)
        elif hasattr(libc := ctypes.CDLL(None), "mallopt"):
            for option, value in ((memory.MMAP_MAX, 65536), (memory.TRIM_THRESHOLD, 64 << 20), (-3, 32 << 20)):
                libc.mallopt(option, value)  # -3: the size from which blocks are given back, at most 32 MiB
        call()

    return run


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread (minimum, maximum) in seconds."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ratio(a: list[float], b: list[float]) -> float:
    """The median over repetitions of a / b, each pair having been timed one after the other."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def report(
    name: str, columns: list[str], rows: list[list[str]], result: dict, file: str | None, device: torch.device
) -> None:
    table = Table(*columns, title=f"{name} on {device}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    result = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), **result, **machine.environment(str(device))}
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(file), result)
    print(json.dumps(result))
