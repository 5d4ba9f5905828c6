"""Memory: what a step needs, which batch size would fit where it ran out, and what is freed is kept for the next step."""

import contextlib
import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastrobust.runtime import limits
from fastrobust.runtime.errors import FastrobustError, first_line, is_out_of_memory

Trial = Callable[..., None]
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt
PLENTY = 4  # times what is needed: blocks of many sizes leave gaps between them


def keep_freed(needed: float) -> None:
    """From here on this process keeps the memory that it frees, if there is plenty beside the `needed` bytes. glibc gives
    large blocks, such as the activations of a batch, back to the system at once, which clears every page before it gives it
    out again. Nothing changes on another system, under a limit of address space, or where the environment says how glibc's
    allocator is to work."""
    if sys.platform != "linux":
        return
    import resource

    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    told = told or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if told or PLENTY * needed > limits.available_memory() or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)


def of_a_pass(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass: the least that a step on x needs beside the weights. It is made
    with tensors that have a shape and no values (`meta`), so that it takes no memory, and where the model does not allow
    that, as it is."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    try:
        shapes = {name: t.to("meta") for name, t in tensors.items()}
        return _kept(lambda: functional_call(model, shapes, (x.to("meta"),)), shapes.values())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return _kept(lambda: model(x), tensors.values())


def _kept(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    known, kept = {t.untyped_storage()._cdata for t in weights}, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # held, so that no other takes its address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


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
