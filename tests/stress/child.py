"""Processes that start at once, because they are forked from one that has imported torch already, and that may be killed."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WARM = ["tests.stress.warm"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(WARM)


class Ended(NamedTuple):
    """status: the exit status, or the negative number of the signal that ended it. seconds: from start, or from the signal
    sent, to the end. work: the seconds of processor time that it had. output: what it printed."""

    status: int
    seconds: float
    work: float
    output: str


def run(
    function: Callable,
    *arguments,
    log: Path,
    after: float | None = None,
    when: Callable[[], bool] | None = None,
    signum: int = 0,
    limit: float = 120,
) -> Ended:
    """Call a function in a process of its own, which exits with what it returns. `after` so many seconds of its work (a busy
    machine changes nothing then), or `when` something has come to be, it is sent a signal. One that lives longer than
    `limit` is killed: status -SIGKILL."""
    process = CONTEXT.Process(target=_enter, args=(function, arguments, str(log)))
    process.start()
    began, sent, done = time.monotonic(), False, 0.0
    while process.exitcode is None:
        process.join(0.003)
        done = max(done, work(process.pid))
        if not sent and ((after is not None and done >= after) or (when is not None and when())):
            began, sent = time.monotonic(), True
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, signum)
        if time.monotonic() - began > limit:
            process.kill()
    output = log.read_text(errors="replace") if log.exists() else ""
    return Ended(process.exitcode, time.monotonic() - began, done, output)


def work(pid: int) -> float:
    """The seconds of processor time that a process has had in all its threads; 0 where it has ended."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) gives
    except OSError:
        return 0.0


def _enter(function: Callable, arguments: tuple, log: str) -> None:
    import torch

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    status = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def stay(worker: int) -> None:
    """In place of `DieWith` in a process that is forked from the server, and so is no child of the one that it works for."""


def limit_memory(extra: int) -> None:
    """From here on this process may take so many bytes of address space more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def return_freed_blocks() -> None:
    """Blocks of 128 kB and more go back to the system when they are freed, as a GPU's do, and small ones have room of their
    own. Else glibc keeps hundreds of freed megabytes in its heap, and under a limit of address space what does not come from
    there (oneDNN's code) finds none; or a small block is the one that fails, where native code does not look (SIGSEGV)."""
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    set_all = [libc.mallopt(arena_max, 1), libc.mallopt(trim_threshold, 1 << 30), libc.mallopt(mmap_threshold, 32 << 20)]
    libc.free(libc.malloc(31 << 20))  # the room for small blocks
    assert all([*set_all, libc.mallopt(mmap_threshold, 1 << 17)])


def ended_by(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
