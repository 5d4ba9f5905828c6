"""How many threads a small network trains with on a CPU: as many as are fastest now. Other programs, and quotas of processor
time, can make one thread ten times faster than two.

Trials take real steps and then put back what these changed, so that a run depends on what was chosen and not on the trials.
"""

from __future__ import annotations

import os
import time

import torch

from fastrobust.data.batch import Batch
from fastrobust.runtime.distributed import World
from fastrobust.train.engine import keep_state
from fastrobust.train.step import Step

SMALL = 0.1  # seconds: longer steps gain from every thread
STATE = 64 << 20  # bytes that a trial may copy
TRIES = 3  # steps with each number of threads, after one that is not counted
GAIN = 0.85  # another number must take less than this share of the time: else noise would decide
AGAIN = 20.0  # seconds after which to look again


class Threads:
    """`look(batch)` before a step tries and chooses now and then. `most`: the threads that there are. Nothing is tried where
    the result must be the same bits every time, where the user has fixed the number, on GPUs and under torchrun."""

    def __init__(self, step: Step, world: World, deterministic: bool):
        self.step, self.most, self.next = step, torch.get_num_threads(), 0.0
        fixed = deterministic or world.joined or "OMP_NUM_THREADS" in os.environ or self.most == 1
        copied = sum(t.nbytes for t in (*step.learner.tensors().values(), *step.state.values()))
        self.tries = step.learner.device.type == "cpu" and not fixed and copied < STATE

    def look(self, batch: Batch) -> str | None:
        """Choose anew if it is time to. Returns what has changed, in words, or None."""
        if not self.tries or time.monotonic() < self.next:
            return None
        before, (chosen, seconds) = torch.get_num_threads(), fastest(self.step, batch, self.most)
        torch.set_num_threads(chosen)
        self.next = time.monotonic() + AGAIN
        if seconds[self.most] > SMALL and chosen == self.most:
            self.tries = False
        if chosen == before:
            return None
        found = ", ".join(f"{n}: {1000 * s:.3g} ms" for n, s in seconds.items())
        return f"threads: {chosen} instead of {before} (a step with {found}); OMP_NUM_THREADS fixes it"


def fastest(step: Step, batch: Batch, most: int) -> tuple[int, dict[int, float]]:
    """(the number of threads to take, the seconds of a step with every number that was tried)."""
    put_back, seconds, count = keep_state(step, batch.images.device), {}, most
    while count >= 1:
        torch.set_num_threads(count)
        times = []
        for _ in range(1 + TRIES):
            began = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - began)
        seconds[count] = sorted(times[1:])[TRIES // 2]
        if count == most and seconds[count] > SMALL:
            break
        count //= 2
    put_back()
    best = min(seconds, key=seconds.get)
    return (best if seconds[best] < GAIN * seconds[most] else most), seconds
