"""Loader of WebDataset shards with NVIDIA DALI: decodes on the GPU (`mixed`, with the hardware decoder where the chip has
one), or on the CPU where there is none.

DALI's own readers shuffle within a buffer and cannot start within an epoch; here the bytes are read in the loader's order
and fed to the pipeline, which decodes, crops and resizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from fastrobust.data.batch import Batch
from fastrobust.data.loaders.base import Job, Loader
from fastrobust.data.prepared import regions
from fastrobust.data.prepared.records import Records
from fastrobust.runtime.errors import ConfigError, DataError

AHEAD = 2  # batches in DALI's hands


def dali():
    """The modules (fn, types, Pipeline). Raises ConfigError where DALI is absent."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ConfigError(
            f"loader: dali is not installed ({error}); `pip install 'fastrobust[dali]'` (CUDA 12) or "
            "'fastrobust[dali-cuda130]', or set `loader: torch`"
        ) from None
    return fn, types, Pipeline


class Dali(Loader):
    def __init__(self, records: Records, *arguments, **options):
        dali()
        self.records = records
        super().__init__(records, *arguments, **options)

    def _pipeline(self, inputs: Iterator[tuple], batch_size: int):
        """Takes inputs a little ahead of what it gives."""
        fn, types, Pipeline = dali()
        gpu = self.device.type == "cuda"
        device_id = (torch.cuda.current_device() if self.device.index is None else self.device.index) if gpu else None
        pipeline = Pipeline(batch_size, self.workers, device_id, prefetch_queue_depth=AHEAD)
        with pipeline:
            files, start, end = fn.external_source(source=inputs, num_outputs=3)
            images = fn.decoders.image(files, device="mixed" if gpu else "cpu", output_type=types.RGB)
            side = float(self.resolution)
            images = fn.resize(
                images, size=[side, side], roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _inputs(self, job: Job) -> tuple:
        """(JPEGs that hold the boxes, where in these they start and end) of a batch; an image that is to be mirrored starts
        at its right."""
        records, files = self.records, []
        boxes, flips = job.boxes(records.height[job.index], records.width[job.index])
        start = boxes[:, :2].astype(np.float32)
        for k, (i, (top, left, height, width)) in enumerate(zip(job.index.tolist(), boxes.tolist(), strict=True)):
            box = top - 1, left - 1, height + 2, width + 2  # DALI looks at the pixels around it
            part, *place = regions.cut(records.read(self.files, i), *box)
            files.append(np.frombuffer(part, np.uint8))
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
        for _ in range(len(jobs)):
            yield self._take(pipeline, fed)

    def _take(self, pipeline, fed: deque[Job]) -> Batch:
        # on the stream of the steps: else the host waits here until the batch is decoded, and cannot queue the next step
        stream = [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []
        try:
            (output,) = pipeline.run(*stream)
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "rror" in line), "DALI gave no reason")
            where = f"{self.records.files[0]} or a shard beside it"
            raise DataError(
                f"an image in {where} is damaged, or DALI failed ({reason.strip()}): write the files again"
            ) from None
        job = fed.popleft()
        if self.device.type == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            side = self.resolution
            images = torch.empty(len(job.index), side, side, 3, dtype=torch.uint8, device=self.device)
            feed_ndarray(output.as_tensor(), images, cuda_stream=stream[0])
        else:
            images = torch.from_numpy(np.array(output.as_tensor()))
        images, *numbers = self.finish(images, job)
        return Batch(images, *(t.to(self.device, non_blocking=True) for t in numbers))
