"""Loader of .beton files with FFCV's own native code (turbojpeg, OpenCV), called from threads.

FFCV's Python Loader is not used: it cannot start within an epoch, draws its crops from generators that no seed reaches,
waits for ever when its thread fails, sets the number of torch's threads when imported, and is compiled anew (about 6 s) for
every phase. What makes it fast is the file and the native code; around these this is the smallest thing that is exact.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fastrobust.data.batch import Batch
from fastrobust.data.loaders import prefetch
from fastrobust.data.loaders.base import Job, Loader
from fastrobust.data.prepared.records import Records
from fastrobust.runtime.errors import ConfigError, DataError, first_line

DEPTH = 3  # batches made ahead


@cache
def native() -> ctypes.CDLL:
    """FFCV's library of native functions. Raises ConfigError where it is absent or does not load."""
    advice = (
        "install it with `apt-get install -y --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config g++` and "
        "`pip install 'fastrobust[ffcv]'`, or set `loader: torch`"
    )
    package = importlib.util.find_spec("ffcv")
    if package is None:
        raise ConfigError(f"loader: ffcv is not installed; {advice}")
    try:
        library = ctypes.CDLL(str(next(Path(package.submodule_search_locations[0]).glob("_libffcv*.so"))))
    except (OSError, StopIteration, TypeError) as error:
        raise ConfigError(f"loader: ffcv is installed, but does not load ({first_line(error)}); {advice}") from None
    library.resize.argtypes, library.resize.restype = 11 * [ctypes.c_int64], None
    library.imdecode.argtypes = (
        [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p]
        + 6 * [ctypes.c_uint32]
        + 2 * [ctypes.c_bool]
    )
    return library


class Ffcv(Loader):
    def __init__(self, records: Records, *arguments, **options):
        self.native = native()
        super().__init__(records, *arguments, **options)
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ffcv")
        self.local = threading.local()
        self.largest = int((records.height * records.width).max()) * 3

    def decoded(self, jobs) -> Iterator[Batch]:
        return prefetch.on_device(prefetch.ahead((self._batch(job) for job in jobs), DEPTH), self.device)

    def _batch(self, job: Job) -> Batch:
        side, count = self.resolution, len(job.index)
        images = torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        boxes, flips = job.boxes(self.data.height[job.index], self.data.width[job.index])
        pixels, step = images.numpy(), -(-count // self.workers)
        parts = [slice(k, k + step) for k in range(0, count, step)]
        for _ in self.pool.map(lambda part: self._decode(job.index[part], boxes[part], flips[part], pixels[part]), parts):
            pass
        batch = self.finish(images, job)
        return Batch(batch.images, *(t.pin_memory() for t in batch[1:])) if self.device.type == "cuda" else batch

    def _decode(self, index: np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
        """Fill out, B x resolution x resolution x 3. The native functions release the interpreter."""
        if not hasattr(self.local, "pixels"):
            self.local.pixels = np.empty(self.largest, np.uint8)
        records, pixels, side = self.data, self.local.pixels.ctypes.data, self.resolution
        target, stride = out.ctypes.data, side * side * 3
        for k, i in enumerate(index.tolist()):
            data = records.read(self.files, i)
            height, width = int(records.height[i]), int(records.width[i])
            top, left, h, w = boxes[k].tolist()
            source = pixels
            if records.raw[i]:
                source = np.frombuffer(data, np.uint8).ctypes.data
            elif self.native.imdecode(data, len(data), height, width, pixels, height, width, 0, 0, 1, 1, False, False):
                raise DataError(f"image {i} of {records.files[0]} is damaged: write the file again")
            self.native.resize(0, source, height, width, top, top + h, left, left + w, target + k * stride, side, side)
            if flips[k]:
                out[k] = out[k, :, ::-1].copy()

    def close(self) -> None:
        self.pool.shutdown()
        super().close()
