"""A disk that is full or read-only, memory that runs out, clocks that are set, 200 epochs that must not grow, and runs that
must come out the same again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fastrobust.__main__ import main as cli
from fastrobust.runtime import run_directory
from tests.stress import child, kills, tiny

MEGABYTE = 1 << 20


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[Path | None]:
    """A file system of its own in memory, or None where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def explained(ended: child.Ended, *words: str) -> bool:
    return ended.status == 2 and "Traceback" not in ended.output and any(word in ended.output for word in words)


def full_disk(config: Path, folder: Path, sizes: int) -> dict:
    """Runs on disks from too small for anything to just too small. Each must end with an explanation; given room, each must
    go on and come to the same result."""
    job = kills.training(config)
    expected, _ = kills.undisturbed(job, folder / "undisturbed")
    needed = sum(file.stat().st_size for file in (folder / "undisturbed").rglob("*") if file.is_file())
    stages, wrong = {}, []
    for i in range(sizes):
        size = 64 * 1024 + (needed * i // sizes)
        with small_disk(folder / f"disk{i}", str(size)) as disk:
            if disk is None:
                return {"skipped": "no file system may be mounted here", "wrong": []}
            place = disk / "runs"
            place.mkdir()
            ended = kills.call(job, place)
            if not explained(ended, "No space left", "no space left") and not job.done(place):
                wrong.append(f"{size} bytes: {child.ended_by(ended.status)}: {ended.output[-500:]}")
            stage = job.stage(place)
            stages[stage] = stages.get(stage, 0) + 1
            left = [file.name for file in place.rglob(".*")]
            if left:
                wrong.append(f"{size} bytes: left behind {left}")
            remount(disk, "size=64m")
            problem = kills.finish(job, place, expected)
            if problem is not None:
                wrong.append(f"{size} bytes: {problem}")
    return {"disks": sizes, "needed_bytes": needed, "stages": stages, "wrong": wrong}


def read_only_disk(config: Path, folder: Path) -> dict:
    """A run is interrupted, its disk becomes read-only, and it is gone on with: explained; then writable again: the same
    result. A finished run on a read-only disk can be evaluated."""
    job = kills.training(config)
    expected, _ = kills.undisturbed(job, folder / "undisturbed")
    wrong = []
    with small_disk(folder / "disk") as disk:
        if disk is None:
            return {"skipped": "no file system may be mounted here", "wrong": []}
        place = disk / "runs"
        place.mkdir()
        kills.call(job, place, when=(place / "tiny" / run_directory.CHECKPOINT).exists, signum=signal.SIGKILL)
        stage = job.stage(place)
        before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
        remount(disk, "ro")
        ended = kills.call(job, place, log=folder / "log")
        if not explained(ended, "Read-only file system"):
            wrong.append(f"going on: {child.ended_by(ended.status)}: {ended.output[-500:]}")
        if {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} != before:
            wrong.append("files changed")
        remount(disk, "rw")
        problem = kills.finish(job, place, expected)
        remount(disk, "ro")
        ended = child.run(evaluate, str(place / "tiny"), log=folder / "log")
        if problem is not None or ended.status != 0:
            wrong.append(problem or f"evaluating: {ended.output[-500:]}")
    return {"interrupted": stage, "wrong": wrong}


def evaluate(*argv: str) -> int:
    return cli(["evaluate", *argv])


# ---- clocks


def with_clock(seed: int, argv: list[str]) -> int:
    """Train while the clock is set to any time between 1970 and 2100, again and again."""
    rng = random.Random(seed)
    time.time = lambda: rng.uniform(0, 4.1e9)
    time.time_ns = lambda: int(time.time() * 1e9)
    return kills.train(*argv)


def clock(config: Path, folder: Path, count: int) -> dict:
    job = kills.training(config)
    expected, seconds = kills.undisturbed(job, folder / "undisturbed")
    wrong = []
    for i in range(count):
        place = folder / f"clock{i}"
        place.mkdir()
        for after in (0.6 * seconds, None):  # interrupted once
            arguments = job.command(place)[1:]
            ended = child.run(with_clock, i, list(arguments), log=folder / "log", after=after, signum=signal.SIGTERM)
        if ended.status != 0 or job.result(place) != expected:
            wrong.append(f"run {i}: {child.ended_by(ended.status)}: {ended.output[-500:]}")
    return {"runs": count, "wrong": wrong}


# ---- determinism


def with_all_cores(argv: list[str]) -> int:
    import torch

    torch.set_num_threads(os.cpu_count())
    return kills.train(*argv)


def repeated(folder: Path, data: Path, count: int) -> dict:
    """A run with `deterministic: true`, on all cores, and `count` times again: the same bits."""
    options = {"deterministic": True, "model": {"name": "preact_resnet18_w16"}, "method": {"name": "fgsm", "init": "random"}}
    options |= {"evaluation": {"steps": 2, "restarts": 1}, "phases": [{"epochs": 1, "batch_size": 8, "resolution": 28}]}
    config = tiny.write_config(folder, data, **options)
    results, wrong = [], []
    for i in range(count + 1):
        ended = child.run(with_all_cores, [str(config), f"output={folder / str(i)}"], log=folder / "log")
        if ended.status != 0:
            return {"wrong": [f"run {i}: {child.ended_by(ended.status)}: {ended.output[-500:]}"]}
        results.append(tiny.result(folder / str(i) / "tiny"))
        if results[i] != results[0]:
            wrong.append(f"run {i} came to another result than the first")
    return {"runs": count + 1, "threads": os.cpu_count(), "wrong": wrong}


# ---- memory


def grow(folder: str, argv: list[str]) -> int:
    """Train, and note after each epoch what this process holds."""
    write = run_directory.write_metrics
    lines = open(Path(folder) / "held", "w")  # noqa: SIM115 (open to the end)

    def noted(directory, history):
        write(directory, history)
        status = Path("/proc/self/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0])  # kB
        lines.write(f"{len(history)} {resident} {len(os.listdir('/proc/self/fd'))} {threading.active_count()}\n")
        lines.flush()

    run_directory.write_metrics = noted
    return kills.train(*argv)


def growth(folder: Path, data: Path, epochs: int) -> dict:
    """Memory, file handles and threads over a run of many epochs: the second quarter of them against the last."""
    phases = [{"epochs": epochs, "batch_size": 16, "resolution": 28}]
    config = tiny.write_config(folder, data, phases=phases, evaluation={"steps": 1, "restarts": 1})
    ended = child.run(grow, str(folder), [str(config), f"output={folder}"], log=folder / "log", limit=1800)
    rows = [list(map(int, line.split())) for line in (folder / "held").read_text().splitlines()]
    early, late = rows[epochs // 4 : epochs // 2], rows[-epochs // 4 :]
    middle = lambda part, column: statistics.median(row[column] for row in part)
    grown = round((middle(late, 1) - middle(early, 1)) / 1024, 2)
    figures = {
        "epochs": len(rows),
        "resident_megabytes": round(middle(late, 1) / 1024, 1),
        "grown_megabytes": grown,
        "file_handles": [middle(early, 2), middle(late, 2)],
        "threads": [middle(early, 3), middle(late, 3)],
    }
    wrong = [] if ended.status == 0 and len(rows) == epochs else [ended.output[-500:]]
    if grown > 4 or middle(early, 2) != middle(late, 2) or middle(early, 3) != middle(late, 3):
        wrong.append("it grows")
    return figures | {"wrong": wrong}


def hungry(extra: int, argv: list[str]) -> int:
    """Train with so many bytes of memory more than this process has now."""
    import torch

    torch.set_num_threads(1)  # every thread reserves address space of its own
    child.return_freed_blocks()
    child.limit_memory(extra)
    return kills.train(*argv)


def out_of_memory(folder: Path, megabytes: int = 200) -> dict:
    """A batch that does not fit into the memory of this process, by a limit that the system keeps. The batch size that the
    message names must fit under the same limit."""
    data = tiny.write_images(folder / "data", train=64, test=10, size=64)
    options = {"model": {"name": "preact_resnet18_w16"}, "method": {"name": "fgsm"}, "guard": {"action": "off"}}
    options |= {"evaluation": {"steps": 1, "restarts": 1, "batch_size": 2}, "schedule": {"name": "cyclic", "max_lr": 1e-3}}
    fitted, wrong, batch, message = None, [], 64, ""
    for attempt in range(2):
        phases = [{"epochs": 1, "batch_size": batch, "resolution": 64}]
        config = tiny.write_config(folder, data, phases=phases, **options)
        argv = [str(config), f"output={folder / str(attempt)}"]
        ended = child.run(hungry, megabytes * MEGABYTE, argv, log=folder / "log")
        if attempt == 0:
            message = ended.output.strip().splitlines()[-1] if ended.output.strip() else ""
            if not explained(ended, "was tried and fits") or "phases.0.batch_size=" not in message:
                return {"wrong": [f"{child.ended_by(ended.status)}: {ended.output[-800:]}"]}
            batch = fitted = int(message.rpartition("phases.0.batch_size=")[2])
        elif ended.status != 0:
            wrong.append(f"a batch of {batch} does not fit after all, {child.ended_by(ended.status)}: {ended.output[-500:]}")
    return {"limit_megabytes": megabytes, "asked": 64, "named": fitted, "wrong": wrong}
