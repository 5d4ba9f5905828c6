"""One run in several processes, one of which is killed: the others end by themselves, and it goes on to the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastrobust.runtime import run_directory
from fastrobust.runtime.interrupt import RESUME_ME
from tests.stress import child, kills, tiny

PHASES = [{"epochs": 3, "batch_size": 4, "resolution": 28}, {"epochs": 2, "batch_size": 8, "resolution": 28}]


def as_rank(rank: int, size: int, port: int, function, *arguments) -> int:
    """What torchrun does to a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    return function(*arguments)


def together(folder: Path, function, *arguments, size: int = 2, limit: float = 120, **to_last) -> list[child.Ended]:
    """A function called in `size` processes at once. `to_last`: when the last one gets which signal (see child.run)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(size) as threads:
        started = [
            threads.submit(
                child.run,
                *(as_rank, rank, size, port, function, *arguments),
                log=folder / f"rank{rank}.log",
                limit=limit,
                **(to_last if rank == size - 1 else {}),
            )
            for rank in range(size)
        ]
        return [process.result() for process in started]


def lost_process(folder: Path, count: int) -> dict:
    """Runs of two processes, of which the last is killed at a random moment after the run directory is there."""
    rng = random.Random(3)
    config = tiny.write_config(folder, tiny.write_images(folder / "data"), phases=PHASES)
    calm = folder / "undisturbed"
    calm.mkdir()
    together(calm, int)  # from here on nothing waits for imports
    began = time.monotonic()
    ended = together(calm, kills.train, str(config), f"output={calm}")
    seconds = time.monotonic() - began
    assert [one.status for one in ended] == [0, 0], ended
    expected, wrong, stages = tiny.result(calm / "tiny"), [], Counter()
    for i in range(count):
        place = folder / f"lost{i}"
        place.mkdir()
        due = Moment(place / "tiny" / run_directory.CONFIG, rng.uniform(0, 0.8 * seconds))
        first, last = together(place, kills.train, str(config), f"output={place}", limit=60, when=due, signum=signal.SIGKILL)
        stages[kills.training(config).stage(place)] += 1
        whole = first.status == 0 and (place / "tiny" / run_directory.SUMMARY).exists()  # it was killed when all was done
        lost = last.status == -signal.SIGKILL and not whole
        if lost and (first.status != RESUME_ME or "another process was lost" not in first.output):
            wrong.append(f"{place.name}: the other ended with {child.ended_by(first.status)}: {first.output[-400:]}")
        if not (place / "tiny" / run_directory.SUMMARY).exists():
            ended = together(place, kills.train, "--resume", str(place / "tiny"))
            if [one.status for one in ended] != [0, 0]:
                wrong.append(f"{place.name}: going on: {[one.output[-400:] for one in ended]}")
                continue
        if tiny.result(place / "tiny") != expected:
            wrong.append(f"{place.name}: another result than that of the undisturbed run")
        else:
            shutil.rmtree(place)
    return {"kills": count, "stages": dict(stages.most_common()), "wrong": wrong}


class Moment:
    """So many seconds after a file has come to be."""

    def __init__(self, file: Path, seconds: float):
        self.file, self.seconds, self.since = file, seconds, None

    def __call__(self) -> bool:
        if self.since is None and self.file.exists():
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() - self.since >= self.seconds
