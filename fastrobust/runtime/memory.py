"""Memory: what a step needs, and which batch size would fit where it ran out."""

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastrobust.runtime.errors import FastrobustError, first_line, is_out_of_memory

Trial = Callable[..., None]


def of_a_pass(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, seen by making one: the least that a step on x needs beside the
    weights."""
    kept, weights = {}, {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model(x)
    return sum(size for place, size in kept.items() if place not in weights)


def largest_that_fits(trial: Trial, *batch: Tensor) -> int:
    """The first of half the batch, a quarter, … for which `trial(*batch)` runs twice; 0 if not even for one image."""
    size = len(batch[0]) // 2
    while size:
        gc.collect()
        if batch[0].device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for _ in range(2):
                trial(*(t[:size] for t in batch))
            return size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        size //= 2
    return 0


@contextlib.contextmanager
def explained(what: object, key: str, trial: Trial, *batch: Tensor, processes: int = 1) -> Iterator[None]:
    """Turns a lack of memory inside into a FastrobustError that says which value of `key` was tried with `trial(*batch)` and
    fits; `processes` share that value. What the trials change is changed."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of what failed
        reason = first_line(error)
    size = largest_that_fits(trial, *batch) * processes
    if size:
        advice = f"{size} was tried and fits: set {key}={size}"
    else:
        advice = f"not even 1 fits ({reason}): use a smaller model or resolution"
    raise FastrobustError(f"{what}: out of memory on {batch[0].device} with {len(batch[0])} images at once; {advice}")
