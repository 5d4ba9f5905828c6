"""Processes that are killed at any moment and started again: what they come to must be what they come to undisturbed.

A `Job` is anything that can be killed and run again: training, writing data files. Another needs the same things and a line
in `parts.PARTS`. Training in several processes, where one of them is killed, is in `ranks.py`.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastrobust.__main__ import main as cli
from fastrobust.data.loaders import PREPARED, READERS
from fastrobust.data.prepared import records
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import DataError
from fastrobust.runtime.interrupt import RESUME_ME
from fastrobust.runtime.progress import Progress
from tests.stress import child, tiny


class Job(NamedTuple):
    """Each function takes the folder that the job works in.

    command: (function, argument, …) that begins the job there or goes on with it, whichever is due.
    done: whether it is finished. result: what it came to, to be compared. stage: in words, where it stands now. sound: what
    is wrong with what is there while it is not finished.
    """

    command: Callable[[Path], tuple]
    done: Callable[[Path], bool]
    result: Callable[[Path], Any]
    stage: Callable[[Path], str]
    sound: Callable[[Path], str | None] = lambda folder: None


def training(config: Path) -> Job:
    """The run of a config, whose folder is where its run directories go."""

    def directory(folder: Path) -> Path:
        return folder / "tiny"

    def command(folder: Path) -> tuple:
        if (directory(folder) / run_directory.CONFIG).exists():
            return train, "--resume", str(directory(folder))
        return train, str(config), f"output={folder}"

    def stage(folder: Path) -> str:
        there = {file.name for file in directory(folder).iterdir()} if directory(folder).exists() else set()
        if run_directory.CONFIG not in there:
            return "before the run directory was there"
        if any(name.startswith(f".{run_directory.CHECKPOINT}") for name in there):
            return "while a checkpoint was written"
        if any(name.startswith(".") for name in there):
            return "while another file was written"
        if run_directory.CHECKPOINT not in there:
            return "between two checkpoints' renames" if run_directory.PREVIOUS in there else "before the first checkpoint"
        if run_directory.SUMMARY in there:
            return "after the end"
        if run_directory.WEIGHTS in there:
            return "during evaluation"
        metrics = directory(folder) / run_directory.METRICS  # not there in the first epoch
        epochs = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        return f"in phase {2 if epochs >= 2 else 1}"

    return Job(
        command,
        lambda folder: (directory(folder) / run_directory.SUMMARY).exists(),
        lambda folder: tiny.result(directory(folder)),
        stage,
    )


def train(*argv: str) -> int:
    return cli(["train", *argv])


def writing(kind: str, source: Path) -> Job:
    """Writing a folder of images for the loader `kind`, in two sizes and two splits, to `out` in the job's folder."""
    read = READERS[PREPARED[kind][0]]
    wanted = [("train", 20), ("train", "original"), ("test", "original")]

    def command(folder: Path) -> tuple:
        options = ["--data", source, "--output", folder / "out", "--sizes", "20", "original", "--storage", "mixed"]
        return cli, ["prepare", kind, *map(str, ["image_folder", *options, "--workers", 2])]

    def stage(folder: Path) -> str:
        there = {file.name for file in (folder / "out").iterdir()} if (folder / "out").exists() else set()
        if not there:
            return "before the first file was there"
        if any(name.startswith(".") for name in there):
            return "while a manifest was written"
        if any(name.endswith(".index.npy.partial") for name in there):
            return "while an index was written"
        if any(name.endswith(".partial") for name in there):
            return "while images were written"
        manifests = sum(name.endswith(".json") for name in there)
        return "between two files" if manifests < len(wanted) else "after the end"

    def sound(folder: Path) -> str | None:
        """Whatever has a manifest must be whole."""
        out = folder / "out"
        for split, size in wanted:
            if records.manifest_path(out, split, size).exists():
                try:
                    records.verify(out, read(out, split, size).manifest)
                except DataError as error:
                    return f"a killed write looks whole: {error}"
        return None

    return Job(
        command,
        lambda folder: all(records.manifest_path(folder / "out", *which).exists() for which in wanted),
        lambda folder: {file.name: file.read_bytes() for file in (folder / "out").iterdir()},
        stage,
        sound,
    )


def call(job: Job, folder: Path, **options) -> child.Ended:
    return child.run(*job.command(folder), **{"log": folder.parent / f"{folder.name}.log"} | options)


def undisturbed(job: Job, folder: Path) -> tuple[Any, float]:
    """(result, seconds of work) of the job when nothing happens to it."""
    folder.mkdir(parents=True)
    child.run(int, log=folder / "log")  # from here on nothing waits for imports
    ended = call(job, folder)
    assert ended.status == 0, ended
    return job.result(folder), ended.work


def finish(job: Job, folder: Path, expected: Any) -> str | None:
    """Let the job run to its end. Returns what is wrong, or None."""
    ended = None if job.done(folder) else call(job, folder)
    if ended is not None and (ended.status != 0 or not job.done(folder)):
        return f"{folder.name}: going on ended with {child.ended_by(ended.status)}: {ended.output[-400:]}"
    if job.result(folder) != expected:
        return f"{folder.name}: another result than that of the undisturbed job"
    left = [str(file) for pattern in (".*", "*.partial") for file in folder.rglob(pattern)]
    return f"{folder.name}: left behind {left}" if left else None


def kill_at_random(job: Job, folder: Path, count: int, seed: int = 0, signum: int = signal.SIGKILL, tear=None) -> dict:
    """`count` kills at random moments. A job is begun, killed and gone on with, killed again with chance 1/2, and so on to
    its end. `tear(folder, rng)`, if given, damages a file after each kill and says whether it did."""
    rng = random.Random(seed)
    expected, seconds = undisturbed(job, folder / "undisturbed")
    stages, statuses, wrong, slowest, jobs, torn = Counter(), Counter(), [], 0.0, 0, 0
    bar = Progress("killed", count)
    while sum(stages.values()) < count and len(wrong) < 5:
        place = folder / f"job{jobs}"
        place.mkdir()
        jobs += 1
        fresh = True  # one that goes on has less before it
        while sum(stages.values()) < count:
            ended = call(job, place, after=rng.uniform(0, seconds) * (1 if fresh else 0.6), signum=signum)
            fresh = False
            if job.done(place):
                break
            stages[job.stage(place)] += 1
            statuses[child.ended_by(ended.status)] += 1
            bar.advance(1, f"{len(wrong)} wrong" if bar.due() else None)
            slowest = max(slowest, ended.seconds)
            if ended.status not in (-signum, RESUME_ME):
                wrong.append(f"{place.name}: {child.ended_by(ended.status)}: {ended.output[-400:]}")
            problem = job.sound(place)
            if problem is not None:
                wrong.append(f"{place.name}: {problem}")
            if tear is not None:
                torn += tear(place, rng)
            if rng.random() < 0.5:
                break
        problem = finish(job, place, expected)
        if problem is not None:
            wrong.append(problem)
        else:
            shutil.rmtree(place)
    figures = {"kills": sum(stages.values()), "jobs": jobs, "stages": dict(stages.most_common()), "wrong": wrong}
    if signum != signal.SIGKILL:
        figures |= {"statuses": dict(statuses), "slowest_stop_seconds": round(slowest, 2)}
    return figures | ({"torn": torn} if tear is not None else {})


def tear_checkpoint(folder: Path, rng: random.Random) -> bool:
    """Cut the last checkpoint short or change a byte of it, if the one before is there too."""
    last, previous = folder / "tiny" / run_directory.CHECKPOINT, folder / "tiny" / run_directory.PREVIOUS
    if not (last.exists() and previous.exists()):
        return False
    content = bytearray(last.read_bytes())
    if rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    last.write_bytes(content)
    return True


def die_in_write(at: int, counted: Path, function: Callable[..., int], *arguments) -> int:
    """Call a function, but kill this process at the `at`-th operation on a file that is being written: in the middle of a
    write, before it is flushed, before it is renamed. If it lives, the number of operations is written to `counted`."""
    import os

    operations = 0

    def due() -> bool:
        nonlocal operations
        operations += 1
        return operations == at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def watched(function):
        def call(*arguments, **options):
            if due():
                die()
            return function(*arguments, **options)

        return call

    class Torn:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if due():
                self.file.write(bytes(data)[: len(bytes(data)) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

    open_handle = os.fdopen
    os.fdopen = lambda *arguments, **options: Torn(open_handle(*arguments, **options))
    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    status = function(*arguments)
    counted.write_text(str(operations))
    return status


def kill_in_writes(job: Job, folder: Path, count: int) -> dict:
    """A job is killed at one operation on a file, gone on with and compared; `count` times, evenly spaced over the
    operations that it makes (hundreds in training)."""
    expected, _ = undisturbed(job, folder / "undisturbed")
    counted = folder / "counted"
    counted.mkdir()
    child.run(die_in_write, 0, folder / "operations", *job.command(counted), log=folder / "counted.log")
    operations = int((folder / "operations").read_text())
    stages, wrong = Counter(), []
    for i in range(count):
        at = 1 + (2 * i + 1) * operations // (2 * count)
        place = folder / f"write{at}"
        place.mkdir()
        ended = child.run(die_in_write, at, folder / "lived", *job.command(place), log=folder / "killed.log")
        if ended.status != -signal.SIGKILL:
            wrong.append(f"operation {at}: {child.ended_by(ended.status)}: {ended.output[-400:]}")
        stages[job.stage(place)] += 1
        problem = job.sound(place) or finish(job, place, expected)
        if problem is not None:
            wrong.append(problem)
        shutil.rmtree(place)
    return {"operations": operations, "kills": sum(stages.values()), "stages": dict(stages.most_common()), "wrong": wrong}
