"""How many threads a small network trains with on a CPU: as many as are fastest now. Other programs, and quotas of processor
time, can make one thread ten times faster than two.

Trials take real steps and then put back what these changed, so that a run depends on what was chosen and not on the trials.
"""

import os
import time

import torch

from fastrobust.data.batch import Batch
from fastrobust.runtime.distributed import World
from fastrobust.train.engine import keep_state
from fastrobust.train.step import Step

SMALL = 1.0  # seconds: longer steps gain from every thread
STATE = 64 << 20  # bytes that a trial may copy
TRIES = 3  # steps with each number of threads, after one that is not counted
GAIN = 0.85  # another number must take less than this share of the time of the present one: else noise would decide
AGAIN, SHARE = 20.0, 0.02  # seconds after which to look again, and the most of the time that trials may take


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
        before, began = torch.get_num_threads(), time.monotonic()
        chosen, seconds = fastest(self.step, batch, self.most, before)
        torch.set_num_threads(chosen)
        now = time.monotonic()
        self.next = now + max(AGAIN, (now - began) / SHARE)
        if seconds[self.most] > SMALL and chosen == self.most:
            self.tries = False
        if chosen == before:
            return None
        found = ", ".join(f"{n}: {1000 * s:.3g} ms" for n, s in seconds.items())
        return f"threads: {chosen} instead of {before} (a step with {found}); OMP_NUM_THREADS fixes it"


def fastest(step: Step, batch: Batch, most: int, now: int) -> tuple[int, dict[int, float]]:
    """(the number of threads to take, the seconds of a step with every number that was tried). now: the present number."""
    put_back, seconds, count = keep_state(step, batch.images.device), {}, most
    while count >= 1:
        torch.set_num_threads(count)
        times: list[float] = []
        while len(times) < 1 + TRIES and not (times and times[0] > SMALL):
            began = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - began)
        seconds[count] = sorted(times[1:] or times)[len(times[1:]) // 2]
        if count == most and seconds[count] > SMALL:
            break
        count //= 2
    put_back()
    best, stay = min(seconds, key=seconds.get), now if now in seconds else most
    return (best if seconds[best] < GAIN * seconds[stay] else stay), seconds
