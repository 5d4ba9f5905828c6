"""Loader on torch's DataLoader and Pillow: needs nothing else. It reads WebDataset shards, or the source itself."""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import mmap
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkContext
from multiprocessing.queues import Queue

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastrobust.data.batch import Batch
from fastrobust.data.loaders import prefetch
from fastrobust.data.loaders.base import Job, Loader
from fastrobust.data.prepared.records import stored_size
from fastrobust.data.sets import Pictures
from fastrobust.runtime.errors import DataError, first_line

AHEAD = 2  # batches that each worker makes ahead of time


class Torch(Loader):
    """From the source, images are cropped as if their short side had first been resized to `size`, in one resize."""

    def decoded(self, jobs) -> Iterator[Batch]:
        workers = min(self.workers, len(jobs)) if self.workers > 1 else 0
        made = self._of_workers(jobs, workers) if workers else map(self.batch, jobs)
        yield from prefetch.on_device(map(self._sound, made), self.device)

    def _sound(self, made: Batch | DataError) -> Batch:
        """A batch for the device. Raises a worker's DataError."""
        if isinstance(made, DataError):
            raise made
        return Batch(*(t.pin_memory() for t in made)) if self.device.type == "cuda" else made

    def _of_workers(self, jobs, workers: int) -> Iterator[Batch | DataError]:
        """Whole batches of several processes. Workers write pixels into memory that is shared before they are forked, and
        send short messages: one that is killed in the middle of a long message would leave its parent waiting for the rest.
        Nothing goes through /dev/shm, of which a container may have little."""
        shape = len(jobs[0].index), self.resolution, self.resolution, self.channels
        slots = shared(AHEAD * workers + 1, shape)  # one more than are made while a batch is copied
        made = DataLoader(
            _Batches(self, jobs, slots),
            batch_size=None,
            collate_fn=lambda said: said,
            generator=torch.Generator(),  # its own: the default one is the training step's
            num_workers=workers,
            prefetch_factor=AHEAD,
            multiprocessing_context=Forked(),
            worker_init_fn=DieWith(os.getpid()),
        )
        said = self._explained(made)
        for k, error in enumerate(said):
            if error:
                said.close()  # ends the workers; the error's traceback would keep them
                yield error
                return
            pixels = slots[k % len(slots), : len(jobs[k].index)]
            pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels.clone()
            yield self.labelled(pixels.permute(0, 3, 1, 2), jobs[k])

    def _explained(self, batches: DataLoader) -> Iterator[DataError | None]:
        """What the workers say of their batches; what a worker died of becomes a DataError."""
        with quiet_deaths():
            iterator = iter(batches)
        while True:
            try:
                result = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                del iterator
                raise DataError(f"a worker of the torch loader died ({first_line(error)}): is memory short?") from None
            yield result

    def batch(self, job: Job) -> Batch | DataError:
        side = self.resolution
        images = torch.empty(len(job.index), side, side, 3, dtype=torch.uint8)
        try:
            for k, i in enumerate(job.index.tolist()):
                image = self._open(i)
                width, height = stored_size(*image.size, self.size, None)
                boxes, flips = job.boxes(np.array([height]), np.array([width]), k)
                top, left, h, w = boxes[0].tolist()
                if (h, w, width, height) == (side, side, *image.size):
                    image = image.crop((left, top, left + w, top + h))
                else:
                    x, y = image.width / width, image.height / height  # more than 1 if the source is larger than `size`
                    box = (left * x, top * y, min((left + w) * x, image.width), min((top + h) * y, image.height))
                    image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
                pixels = np.asarray(image)
                images[k] = torch.from_numpy((pixels[:, ::-1] if flips[0] else pixels).copy())
        except DataError as error:
            return error
        return self.finish(images, job)

    def _open(self, i: int) -> Image.Image:
        if isinstance(self.data, Pictures):
            return self.data.image(i)
        data = self.data.read(self.files, i)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            return image
        except Exception as error:  # a damaged image can raise anything
            file = self.data.files[int(self.data.file[i])]
            raise DataError(f"image {i} in {file} is damaged ({first_line(error)}): write the file again") from None


@contextlib.contextmanager
def quiet_deaths() -> Iterator[None]:
    """Inside, torch may set its handler of SIGCHLD, which raises wherever the process is when a worker dies, in a training
    step as in another DataLoader's work; afterwards it is gone. Waiting for a batch notices the death too, within 5 s."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


class Flag:
    """An Event without a lock. A process that is killed while it looks at Python's own one never gives the lock back, and
    the others wait for it for ever."""

    def __init__(self):
        self.byte = mmap.mmap(-1, 1)  # shared with the processes that are forked

    def set(self) -> None:
        self.byte[0] = 1

    def is_set(self) -> bool:
        return self.byte[0] == 1


class Forked(ForkContext):
    Event = Flag  # torch's workers and their parent look at one


class DieWith:
    """Called in a worker: it dies with its parent. torch's workers notice up to 5 s after their batch is done that they are
    alone, and until then they hold what they inherited, the lock on the run too: `--resume` would be refused."""

    SET_PDEATHSIG = 1  # of Linux's prctl

    def __init__(self, parent: int):
        self.parent = parent

    def __call__(self, worker: int) -> None:
        with contextlib.suppress(OSError, AttributeError):  # another system: they notice in the end
            ctypes.CDLL(None).prctl(self.SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it died before it could be asked for
            os._exit(1)
        Queue._on_queue_feeder_error = staticmethod(lose_no_batch)


def lose_no_batch(error: Exception, batch) -> None:
    """Called in a worker that could not send a batch, which Python would drop without a word: the parent would wait for
    ever. It notices a dead worker within 5 s."""
    print(f"a worker of the torch loader could not send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def shared(count: int, shape: tuple[int, ...]) -> Tensor:
    """`count` uint8 tensors of a shape, as one, in memory that this process shares with those that it forks."""
    return torch.frombuffer(mmap.mmap(-1, count * math.prod(shape)), dtype=torch.uint8).view(count, *shape)


class _Batches(Dataset):
    """Batch k is made whole by one worker. Its pixels go into slot k modulo the number of slots; None is sent, or a
    DataError."""

    def __init__(self, loader: Torch, jobs, slots: Tensor):
        self.loader, self.jobs, self.slots = loader, jobs, slots

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, k: int) -> DataError | None:
        batch = self.loader.batch(self.jobs[k])
        if isinstance(batch, DataError):
            return batch
        self.slots[k % len(self.slots), : len(batch.labels)] = batch.images.permute(0, 2, 3, 1)
        return None
