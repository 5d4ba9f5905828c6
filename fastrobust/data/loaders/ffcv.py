"""Loader of .beton files: decodes the part of every JPEG that its crop needs (libjpeg-turbo), in threads.

FFCV itself is not used: its Loader cannot start within an epoch, draws its crops from generators that no seed reaches, waits
for ever when its thread fails, and is compiled anew (about 6 s) for every phase. The pixels are those of its decoder: fast
DCT, interpolated colours, then OpenCV's INTER_AREA.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastrobust.data.batch import Batch
from fastrobust.data.loaders import prefetch
from fastrobust.data.loaders.base import Job, Loader
from fastrobust.data.prepared.records import Records
from fastrobust.runtime.errors import ConfigError, DataError, first_line, installing

DEPTH = 2  # batches that the threads work on, and batches that wait


@cache
def functions():
    """(simplejpeg's decode_jpeg, cv2, our `part` and `shrink`). Raises ConfigError where a package does not load."""
    try:
        import cv2
        from simplejpeg import decode_jpeg

        from fastrobust.data.loaders.cut import part
        from fastrobust.data.loaders.resize import shrink
    except ImportError as error:
        advice = f"`{installing('ffcv')}`, or set `loader: torch`"
        raise ConfigError(f"loader: ffcv needs a package that does not load ({first_line(error)}); {advice}") from None
    cv2.setNumThreads(1)  # the loader has threads of its own
    return decode_jpeg, cv2, part, shrink


class Ffcv(Loader):
    def __init__(self, records: Records, *arguments, **options):
        functions()
        super().__init__(records, *arguments, **options)
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ffcv")
        self.local = threading.local()
        self.largest, self.longest = int((records.height * records.width).max()) * 3, int(records.length.max())

    def decoded(self, jobs) -> Iterator[Batch]:
        return prefetch.on_device(prefetch.ahead(self._batches(jobs), DEPTH), self.device)

    def _batches(self, jobs) -> Iterator[Batch]:
        """The threads go on with the next batch while the last images of one are decoded."""
        begun: deque[tuple[Job, Tensor, list[Future]]] = deque()
        try:
            for job in jobs:
                begun.append((job, *self._begin(job)))
                if len(begun) == DEPTH:
                    yield self._end(*begun.popleft())
            while begun:
                yield self._end(*begun.popleft())
        finally:
            for *_, parts in begun:
                for part in parts:
                    part.cancel()

    def _begin(self, job: Job) -> tuple[Tensor, list[Future]]:
        side, count = self.resolution, len(job.index)
        images = torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        boxes, flips = job.boxes(self.data.height[job.index], self.data.width[job.index])
        pixels, step = images.numpy(), -(-count // self.workers)
        parts = [slice(k, k + step) for k in range(0, count, step)]
        return images, [self.pool.submit(self._decode, job.index[p], boxes[p], flips[p], pixels[p]) for p in parts]

    def _end(self, job: Job, images: Tensor, parts: list[Future]) -> Batch:
        for part in parts:
            part.result()
        batch = self.finish(images, job)
        return Batch(batch.images, *(t.pin_memory() for t in batch[1:])) if self.device.type == "cuda" else batch

    def _decode(self, index: np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
        """Fill out, B x resolution x resolution x 3. Decoding and resizing release the interpreter."""
        _, cv2, _, shrink = functions()
        side = self.resolution
        if not hasattr(self.local, "pixels"):
            self.local.pixels, self.local.mirrored = np.empty(self.largest, np.uint8), np.empty((side, side, 3), np.uint8)
            self.local.part = np.empty(self.longest, np.uint8)
        for k, (i, (top, left, height, width), flip) in enumerate(zip(index.tolist(), boxes.tolist(), flips, strict=True)):
            image, y, x = self._image(i, top, left, height, width)
            top, left = top - y, left - x
            if min(height, width) >= side and (height % side or width % side):
                shrink(image, top, left, height, width, flip, out[k])
                continue
            target, box = self.local.mirrored if flip else out[k], image[top : top + height, left : left + width]
            cv2.resize(box, (side, side), dst=target, interpolation=cv2.INTER_AREA)
            if flip:
                cv2.flip(target, 1, dst=out[k])

    def _image(self, i: int, *box: int) -> tuple[np.ndarray, int, int]:
        """A part of image i that holds the box, H x W x 3, and the row and the column at which it begins."""
        records = self.data
        data, shape = records.read(self.files, i), (int(records.height[i]), int(records.width[i]), 3)
        if records.raw[i]:
            return np.frombuffer(data, np.uint8, shape[0] * shape[1] * 3).reshape(shape), 0, 0
        try:
            decode_jpeg, _, part, _ = functions()
            data, y, x = part(data, box, self.local.part)
            return decode_jpeg(data, "RGB", fastdct=True, buffer=self.local.pixels), y, x
        except ValueError:
            raise DataError(f"image {i} of {records.files[0]} is damaged: write the file again") from None

    def close(self) -> None:
        self.pool.shutdown()
        super().close()
