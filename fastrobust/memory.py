"""Out of memory: which batch size would fit, found out by trying."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastrobust.errors import FastrobustError, first_line, is_out_of_memory

Step = Callable[[Tensor, Tensor], None]


def largest_that_fits(step: Step, images: Tensor, labels: Tensor) -> int:
    """The first of half the batch, a quarter, … for which `step(images, labels)` runs twice; 0 if not even for one image."""
    size = len(images) // 2
    while size:
        gc.collect()
        if images.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for _ in range(2):
                step(images[:size], labels[:size])
            return size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        size //= 2
    return 0


@contextlib.contextmanager
def explained(what: object, key: str, step: Step, images: Tensor, labels: Tensor, processes: int = 1) -> Iterator[None]:
    """Turns a lack of memory inside into a FastrobustError that says which value of `key` was tried with `step` and fits;
    `processes` share that value. What the trials change is changed."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of what failed
        reason = first_line(error)
    size = largest_that_fits(step, images, labels) * processes
    if size:
        advice = f"{size} was tried and fits: set {key}={size}"
    else:
        advice = f"not even 1 fits ({reason}): use a smaller model or resolution"
    raise FastrobustError(f"{what}: out of memory on {images.device} with {len(images)} images at once; {advice}")
