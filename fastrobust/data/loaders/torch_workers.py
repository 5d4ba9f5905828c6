"""Loader on torch's DataLoader and Pillow: needs nothing else. It reads WebDataset shards, or the source itself."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastrobust.data.batch import Batch
from fastrobust.data.loaders import prefetch
from fastrobust.data.loaders.base import Job, Loader
from fastrobust.data.prepared.records import stored_size
from fastrobust.data.sets import Pictures
from fastrobust.runtime.errors import DataError, first_line


class Torch(Loader):
    """From the source, images are cropped as if their short side had first been resized to `size`, in one resize."""

    def decoded(self, jobs) -> Iterator[Batch]:
        workers = min(self.workers, len(jobs)) if self.workers > 1 else 0
        options = {"num_workers": workers, "prefetch_factor": 2, "multiprocessing_context": "fork"} if workers else {}
        options |= {"worker_init_fn": DieWith(os.getpid())} if workers else {}
        pin, generator = self.device.type == "cuda", torch.Generator()  # its own: the default one is the training step's
        batches = DataLoader(_Batches(self, jobs), batch_size=None, pin_memory=pin, generator=generator, **options)
        yield from prefetch.on_device(self._explained(batches), self.device)

    def _explained(self, batches: DataLoader) -> Iterator[Batch]:
        """The batches; what a worker died of becomes a DataError."""
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
            if isinstance(result, DataError):
                del iterator  # ends its workers; the error's traceback would keep them
                raise result
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


class _Batches(Dataset):
    """Batch k, made whole by one worker."""

    def __init__(self, loader: Torch, jobs):
        self.loader, self.jobs = loader, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, k: int):
        return self.loader.batch(self.jobs[k])
