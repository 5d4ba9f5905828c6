"""Deciding many images in several processes."""

import contextlib
import copy
import os
import pickle
import signal
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import highspy  # noqa: F401 (so that its absence is noticed before the work begins)
import torch
import torch.fx
from torch import Tensor, nn

from fastrobust.data.loaders.torch_workers import DieWith
from fastrobust.data.sets import ImageSet
from fastrobust.runtime.errors import FastrobustError, RunError, first_line
from fastrobust.runtime.progress import Progress
from fastrobust.verification.decide import Decider, Verdict
from fastrobust.verification.network import Network
from fastrobust.verification.store import VERDICTS, Verdicts

CHUNK = 10  # images that a worker looks at together, fewer where that would leave another worker idle


_decider = None  # of a worker


def start_worker(model: bytes, network: bytes, shape: tuple[int, ...], epsilon: float, device: str, die: Callable) -> None:
    global _decider
    die(0)  # with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow, and far below what bounds are widened by
    _decider = Decider(pickle.loads(model), shape, epsilon, pickle.loads(network), torch.device(device))


def look(indices: list[int], images: Tensor, labels: Tensor, timeout: float) -> list[Verdict | None]:
    return _decider.look(indices, images, labels, timeout)


def search(indices: list[int], images: Tensor, labels: Tensor, timeout: float) -> list[Verdict]:
    return [_decider.search(*one, timeout) for one in zip(indices, images, labels, strict=True)]


def portable(model: nn.Module) -> bytes:
    """The model in eval mode on the CPU, pickled so that any process can read it. One whose class stands in the program's
    main file, or in a function, is written as torch's own modules. Raises FastrobustError."""
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()
    try:
        made = pickle.dumps(model)
        with main_left_alone():
            pickle.loads(made)
        return made
    except (AttributeError, ImportError, TypeError, pickle.PicklingError):
        pass
    try:
        traced = torch.fx.symbolic_trace(model)
        for node in traced.graph.nodes:
            node.type = None  # an annotation that is a string cannot be pickled
        traced.recompile()
        return pickle.dumps(traced)
    except Exception as error:  # tracing runs the user's code
        raise FastrobustError(
            f"verification: the verifying processes cannot read {type(model).__name__} ({first_line(error)}): put its class "
            "into a module that can be imported"
        ) from None


def settled(record: dict | None, timeout: float) -> bool:
    """A timeout is tried again when there is more time for it now."""
    return record is not None and (record["verdict"] != "timeout" or record["seconds"] >= 0.95 * timeout)


@contextlib.contextmanager
def main_left_alone() -> Iterator[None]:
    """Processes that are started inside do not run the program's main file again, as Python's would: a script without
    `if __name__ == "__main__"` would start itself in each."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def decide_all(
    model: nn.Module,
    network: Network,
    data: ImageSet,
    kept: Verdicts,
    todo: list[int],
    chosen: list[int],
    epsilon: float,
    timeout: float,
    workers: int,
    device: str = "cpu",
) -> None:
    """Decide the images with the numbers `todo`, of all that are `chosen`, and keep each verdict as it is found: several
    images are looked at together, and each that stays open is searched on its own, before others are looked at. network:
    the model's. timeout: seconds for one image. device: of branch and bound, for all workers. Raises FastrobustError."""
    size = max(1, min(CHUNK, len(todo) // (4 * workers)))
    jobs = deque((look, todo[i : i + size]) for i in range(0, len(todo), size))
    total, pending = len(chosen), {}
    tally = Counter(kept.found[i]["verdict"] for i in chosen if i in kept.found)
    if not jobs:
        return
    about = (portable(model), pickle.dumps(network), tuple(data.images.shape[1:]), epsilon, device, DieWith(os.getpid()))
    pool = ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn"), start_worker, about)
    try:
        with Progress("verify", total, total - len(todo)) as bar:
            while jobs or pending:
                while jobs and len(pending) < 2 * workers:  # one lies ready for each worker
                    task, part = jobs.popleft()
                    with main_left_alone():
                        future = pool.submit(task, part, data.images[part], data.labels[part], timeout)
                    pending[future] = part
                done, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                found = [pair for future in done for pair in zip(pending.pop(future), future.result(), strict=True)]
                verdicts = [v for _, v in found if v]
                jobs.extendleft((search, [i]) for i, v in reversed(found) if not v)
                for v in verdicts:
                    if v.index in kept.found:
                        tally[kept.found[v.index]["verdict"]] -= 1
                    tally[v.verdict] += 1
                if verdicts:
                    kept.add(verdicts)
                detail = "  ".join(f"{tally[name]} {name}" for name in VERDICTS if tally[name])
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
