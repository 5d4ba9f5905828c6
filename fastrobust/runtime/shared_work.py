"""Work that several threads share."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

import torch


def by_threads(work: Callable[[int, int], object], count: int) -> None:
    """Calls `work(first, last)` for parts of 0 to `count`, one for each of torch's threads. Only what runs without the
    interpreter's lock gains."""
    threads = min(count, torch.get_num_threads())
    ends = [k * count // threads for k in range(threads + 1)] if threads > 1 else [0, count]
    parts = list(pairwise(ends))
    waiting = [_pool().submit(work, *part) for part in parts[1:]]
    try:
        work(*parts[0])
    finally:
        wait(waiting)
    for other in waiting:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())
