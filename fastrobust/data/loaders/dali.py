"""Loader of WebDataset shards with NVIDIA DALI: decodes on the GPU (`mixed`, with the hardware decoder where the chip has
one), or on the CPU where there is none.

DALI's own readers shuffle within a buffer and cannot start within an epoch; here the bytes are read in the loader's order
and fed to the pipeline, which decodes, crops and resizes. On a CPU DALI only decodes: its resize took more than half of the
time, and `resize.smooth` gives the same pixels (some differ by 1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fastrobust.data.batch import Batch
from fastrobust.data.loaders import prefetch
from fastrobust.data.loaders.base import Job, Loader
from fastrobust.data.prepared.records import Records
from fastrobust.runtime.errors import ConfigError, DataError, installing

AHEAD = 2  # batches in DALI's hands


def dali():
    """The modules (fn, types, Pipeline). Raises ConfigError where DALI is absent, or numba."""
    try:
        import numba  # noqa: F401
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ConfigError(
            f"loader: dali is not installed ({error}); `{installing('dali')}` (CUDA 12), "
            f"`{installing('dali-cuda130')}`, or set `loader: torch`"
        ) from None
    return fn, types, Pipeline


def resized(images, start, end, side: int):
    """The boxes of a pipeline's images from start to end, side x side. Around them there are as many pixels as it wants."""
    fn, types, _ = dali()
    size, linear = [float(side), float(side)], types.INTERP_LINEAR
    return fn.resize(images, size=size, roi_start=start, roi_end=end, interp_type=linear, antialias=True)


class Dali(Loader):
    def __init__(self, records: Records, *arguments, **options):
        dali()
        self.records = records
        super().__init__(records, *arguments, **options)
        self.pool = None if self.device.type == "cuda" else ThreadPoolExecutor(self.workers, thread_name_prefix="dali")

    def _pipeline(self, inputs: Iterator[tuple], batch_size: int):
        """Takes inputs a little ahead of what it gives."""
        fn, types, Pipeline = dali()
        gpu = self.device.type == "cuda"
        device_id = (torch.cuda.current_device() if self.device.index is None else self.device.index) if gpu else None
        pipeline = Pipeline(batch_size, self.workers, device_id, prefetch_queue_depth=AHEAD)
        with pipeline:
            files, start, end = fn.external_source(source=inputs, num_outputs=3)
            images = fn.decoders.image(files, device="mixed" if gpu else "cpu", output_type=types.RGB)
            pipeline.set_outputs(*([resized(images, start, end, self.resolution)] if gpu else [images, start, end]))
        pipeline.build()
        return pipeline

    def _inputs(self, job: Job) -> tuple:
        """(JPEGs that hold the boxes, where in these they start and end) of a batch; an image that is to be mirrored starts
        at its right."""
        from fastrobust.data.loaders.cut import part

        records, files = self.records, []
        boxes, flips = job.boxes(records.height[job.index], records.width[job.index])
        lengths = records.length[job.index]
        rooms = np.split(np.empty(lengths.sum(), np.uint8), lengths.cumsum()[:-1])
        around = (1 + boxes[:, 2:].max(1) // self.resolution) // 2 + 1  # pixels that the triangles reach beyond a box
        start = boxes[:, :2].astype(np.float32)
        wider = np.concatenate((boxes[:, :2] - around[:, None], boxes[:, 2:] + 2 * around[:, None]), 1)
        for k, (i, box) in enumerate(zip(job.index.tolist(), wider.tolist(), strict=True)):
            data, *place = part(records.read(self.files, i), box, rooms[k])
            files.append(np.frombuffer(data, np.uint8))
            start[k] -= place
        end = start + boxes[:, 2:]
        start[flips, 1], end[flips, 1] = end[flips, 1], start[flips, 1]
        return files, start, end.astype(np.float32)

    def decoded(self, jobs) -> Iterator[Batch]:
        if not len(jobs):
            return
        fed: deque[Job] = deque()

        def inputs() -> Iterator[tuple]:
            for job in jobs:
                fed.append(job)
                yield self._inputs(job)

        pipeline = self._pipeline(inputs(), len(jobs[0].index))
        batches = (self._take(pipeline, fed) for _ in range(len(jobs)))
        yield from batches if self.pool is None else prefetch.ahead(batches, AHEAD)

    def _take(self, pipeline, fed: deque[Job]) -> Batch:
        # on the stream of the steps: else the host waits here until the batch is decoded, and cannot queue the next step
        stream = [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []
        try:
            output, *boxes = pipeline.run(*stream)
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "rror" in line), "DALI gave no reason")
            where = f"{self.records.files[0]} or a shard beside it"
            raise DataError(
                f"an image in {where} is damaged, or DALI failed ({reason.strip()}): write the files again"
            ) from None
        job = fed.popleft()
        side = self.resolution
        images = torch.empty(len(job.index), side, side, 3, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            feed_ndarray(output.as_tensor(), images, cuda_stream=stream[0])
        else:
            self._resize(output, *(np.array(corner.as_tensor()).astype(int) for corner in boxes), images.numpy())
        images, *numbers = self.finish(images, job)
        return Batch(images, *(t.to(self.device, non_blocking=True) for t in numbers))

    def _resize(self, decoded, start: np.ndarray, end: np.ndarray, out: np.ndarray) -> None:
        from fastrobust.data.loaders.resize import smooth

        corner, sides = np.minimum(start, end), abs(end - start)

        def work(k: int) -> None:
            smooth(np.asarray(decoded.at(k)), *corner[k].tolist(), *sides[k].tolist(), bool(start[k, 1] > end[k, 1]), out[k])

        deque(self.pool.map(work, range(len(out))), 0)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        super().close()
