"""Signals that ask a run to stop: from the keyboard, a scheduler, or a terminal that is closed."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

from fastrobust.runtime.command import to_paste
from fastrobust.runtime.errors import FastrobustError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # USR1: Slurm's warning before the time is up
RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: stopped with everything kept, run --resume


class Interrupted(FastrobustError):
    """Stopped by a signal; the run can be resumed. `status` is the exit status that says so."""

    def __init__(self, signum: int, run: Path):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; go on with: {to_paste('train', '--resume', run)}")
        self.signum = signum
        self.status = 128 + signum if signum == signal.SIGINT else RESUME_ME


class Stop(BaseException):
    """A signal, on its way out of `resumable`. No Exception: readers take any of those for damage to their file."""

    def __init__(self, signum: int):
        self.signum, self.status = signum, RESUME_ME


_theirs: ContextVar[bool] = ContextVar("signals belong to the caller", default=False)


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Inside, no handlers are installed: Ctrl-C is a KeyboardInterrupt, as a notebook expects it."""
    token = _theirs.set(True)
    try:
        yield
    finally:
        _theirs.reset(token)


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Inside, the handler gets the signals that ask to stop, but for those that are ignored (`nohup` ignores SIGHUP)."""
    if _theirs.get() or threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    asked = [s for s in STOPPING if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handler) for s in asked}
    try:
        yield
    finally:
        for s, before in previous.items():
            signal.signal(s, before)


@contextlib.contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Inside, a signal raises Interrupted at once: for the parts of a run that keep nothing that must be saved first."""

    def stop(signum: int, frame) -> None:
        raise Stop(signum)

    try:
        with handled(stop):
            yield
    except Stop as stopped:
        raise Interrupted(stopped.signum, run) from None
