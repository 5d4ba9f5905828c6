"""Batches made ahead of time: in a thread on the CPU, and copied to a GPU on a stream of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

import torch

from fastrobust.data.batch import Batch

PATIENCE = 2.0  # seconds between looks at whether the thread still lives


def ahead(batches: Iterable[Batch], depth: int) -> Iterator[Batch]:
    """The same batches, made by a thread that runs up to `depth` ahead. What it raises is raised here."""
    made: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="loader")
    thread.start()
    try:
        while True:
            try:
                item = made.get(timeout=PATIENCE)
            except queue.Empty:
                if thread.is_alive():
                    continue
                raise RuntimeError("the loader's thread died") from None
            if item is None:
                return
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # it knows this frame: as a circle, a DALI pipeline in it would live on into forked workers
            yield item
    finally:
        stop.set()
        thread.join()


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device. To a GPU the next one is copied, on a stream of its own, while this one is used; for that
    their memory must be pinned."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    coming: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = Batch(*(t.to(device, non_blocking=True) for t in batch))
        if coming is not None:
            yield coming
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in copied:
            tensor.record_stream(current)
        coming = copied
    if coming is not None:
        yield coming
