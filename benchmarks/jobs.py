"""Long work in pieces: one job after the other, until all are done or the minutes are over."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from fastrobust.runtime.errors import ConfigError, DataError, FastrobustError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.runtime.progress import duration


class OutOfTime(FastrobustError):
    pass


class Deadline:
    """After `minutes` the job at work is stopped as by SIGTERM: a training writes a checkpoint and can go on."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.timer = None

    def __enter__(self) -> Deadline:
        self.before = signal.signal(signal.SIGTERM, self._stop)
        if self.end is not None:
            self.timer = threading.Timer(max(0.0, self.end - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
            self.timer.daemon = True
            self.timer.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.timer:
            self.timer.cancel()
        signal.signal(signal.SIGTERM, self.before)

    def _stop(self, signum, frame) -> None:
        raise OutOfTime("stopped while evaluating")

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end


def add_options(p: argparse.ArgumentParser) -> None:
    """What every command of such work takes."""
    p.add_argument("--minutes", type=float, help="stop after so long; the run at work can go on later")
    p.add_argument("--device", default="auto")
    p.add_argument("--data", help="where the data set lies (default: the usual places)")
    p.add_argument("--show", action="store_true", help="train nothing: print what the result files hold")


def check(minutes: float | None) -> None:
    """Raises ConfigError."""
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: give a positive number")


def work(jobs: list[tuple[str, Callable[[], None]]], minutes: float | None) -> list[str]:
    """Do the jobs, (name, what is to be done), in their order. Returns what stayed open, and why: a job that failed stops no
    other."""
    left_open: list[str] = []
    begun = time.monotonic()
    with Deadline(minutes) as deadline:
        for i, (name, job) in enumerate(jobs):
            if deadline.over:
                return left_open + [f"{name}: no time left" for name, _ in jobs[i:]]
            if i:
                print(of_all(begun, i, len(jobs)))
            print(f"[{i + 1}/{len(jobs)}] {name}", flush=True)
            try:
                job()
            except (Interrupted, OutOfTime) as error:
                if not deadline.over:
                    raise
                left_open.append(f"{name}: {str(error).splitlines()[0]}")
            except FastrobustError as error:
                left_open.append(f"{name}: {str(error).splitlines()[0]}")
                if isinstance(error, DataError):
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
    return left_open


def of_all(begun: float, done: int, count: int) -> str:
    """How long all jobs have taken, and will: the next ones as long as the ones before, on the average."""
    elapsed = time.monotonic() - begun
    return f"all runs: {duration(elapsed)} so far, about {duration(elapsed / done * (count - done))} left"
