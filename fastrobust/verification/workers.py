"""Deciding many images in several processes."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import highspy  # noqa: F401 (so that its absence is noticed before the work begins)
import torch

from fastrobust.data.loaders.torch_workers import DieWith
from fastrobust.data.sets import ImageSet
from fastrobust.models.weights import load
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.progress import Progress
from fastrobust.verification.decide import Decider
from fastrobust.verification.store import VERDICTS, Verdicts

CHUNK = 10  # images that a worker takes at a time, fewer where that would leave another worker idle


_decider = None  # of a worker


def start_worker(weights: str, shape: tuple[int, ...], epsilon: float, die_with_parent: Callable[[int], None]) -> None:
    global _decider
    die_with_parent(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow, and far below what bounds are widened by
    _decider = Decider(load(weights), shape, epsilon)


def work(indices: list[int], images, labels, timeout: float) -> list:
    return _decider.decide(indices, images, labels, timeout)


def decide_all(arguments, kept: Verdicts, weights: Path, data: ImageSet, todo: list[int], chosen: list[int]) -> None:
    size = max(1, min(CHUNK, len(todo) // (4 * arguments.workers)))
    chunks = [todo[i : i + size] for i in range(0, len(todo), size)]
    total = len(chosen)
    tally = Counter(kept.found[i]["verdict"] for i in chosen if i in kept.found)
    if not chunks:
        return
    about = (str(weights), tuple(data.images.shape[1:]), arguments.epsilon, DieWith(os.getpid()))
    pool = ProcessPoolExecutor(min(arguments.workers, len(chunks)), get_context("spawn"), start_worker, about)
    try:
        with Progress("verify", total, total - len(todo)) as bar:
            futures = [
                pool.submit(work, chunk, data.images[chunk], data.labels[chunk], arguments.timeout) for chunk in chunks
            ]
            for future in as_completed(futures):
                verdicts = future.result()
                for v in verdicts:
                    if v.index in kept.found:
                        tally[kept.found[v.index]["verdict"]] -= 1
                    tally[v.verdict] += 1
                kept.add(verdicts)
                detail = "  ".join(f"{tally[name]} {name}" for name in VERDICTS)
                bar.advance(len(verdicts), detail if bar.due() else None)
    except BrokenProcessPool:
        raise RunError(
            f"a verifying process died (out of memory?); the verdicts so far are in {kept.folder}: run the same command "
            "to go on, with fewer --workers if memory is short"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):  # nothing that still runs is waited for
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
