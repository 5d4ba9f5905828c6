"""The arithmetic of an L-infinity attack between two passes, each part as one Triton kernel with the numbers of the
functions in `threat`. Importing this needs Triton; `Threat` does it where kernels are asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrobust.models.pixel_kernels import store_seen
from fastrobust.models.pixels import Seen, Sees

BLOCK = 1024


@triton.jit
def _number(value, TENSOR: tl.constexpr):
    return tl.load(value) if TENSOR else value


@triton.jit
def _boxed(delta, x):
    """The nearest perturbation with x + delta in [0, 1]."""
    return tl.minimum(tl.maximum(delta, -x), 1.0 - x)


@triton.jit
def _climb(
    delta, gradient, x, out, seen, mean, std, alpha, radius, n, channels,
    PROJECT: tl.constexpr, SEEN: tl.constexpr, TENSOR_A: tl.constexpr, TENSOR_R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * B + tl.arange(0, B)
    g, a = tl.load(gradient + i, i < n, 0.0).to(tl.float32), _number(alpha, TENSOR_A)
    d = tl.load(delta + i, i < n, 0.0) + tl.where(g > 0, a, tl.where(g < 0, -a, 0.0))
    if PROJECT:
        r = _number(radius, TENSOR_R)
        d = tl.minimum(tl.maximum(d, -r), r)
    image = tl.load(x + i, i < n, 0.0)
    d = _boxed(d, image)
    tl.store(out + i, d, i < n)
    if SEEN:
        store_seen(seen, image + d, i, n, mean, std, channels)


@triton.jit
def _start(
    uniform, x, out, seen, mean, std, radius, n, channels,
    CLIP: tl.constexpr, SEEN: tl.constexpr, TENSOR_R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * B + tl.arange(0, B)
    d = (tl.load(uniform + i, i < n, 0.0) * 2.0 - 1.0) * _number(radius, TENSOR_R)
    image = tl.load(x + i, i < n, 0.0)
    if CLIP:
        d = _boxed(d, image)
    tl.store(out + i, d, i < n)
    if SEEN:
        store_seen(seen, image + d, i, n, mean, std, channels)


def alike(*tensors: Tensor, gradient: Tensor | None = None) -> bool:
    """Whether the kernels can walk through these side by side: fp32 (a gradient may be of less precision), one shape, one
    order of the elements, no gaps."""
    first, every = tensors[0], tensors if gradient is None else (*tensors, gradient)
    dense = first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
    same = all(t.shape == first.shape and t.stride() == first.stride() and not t.requires_grad for t in every)
    return dense and same and all(t.dtype == torch.float32 for t in tensors)


def _made(x: Tensor, sees: Sees | None) -> tuple[Tensor, tuple, dict]:
    """A perturbation to be written, with the place for what the network sees, if there is one: `seen` of it, and where the
    kernels take it."""
    out = torch.empty_like(x)
    if sees is None or not x.is_contiguous(memory_format=torch.channels_last):
        return out, (x, x, x), {"SEEN": False}
    seen = torch.empty_like(x, dtype=sees.dtype)
    out.seen = seen.as_subclass(Seen)
    return out, (seen, sees.mean, sees.std), {"SEEN": True}


def climb(
    delta: Tensor,
    gradient: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    radius: float | Tensor | None,
    sees: Sees | None = None,
) -> Tensor:
    """clip_to_box(signed_step(delta, gradient, alpha), x); with a radius `project` instead. sees: then the result has an
    attribute `seen`, x + it for the network."""
    (out, places, seen), n = _made(x, sees), delta.numel()
    with torch.cuda.device_of(x):
        _climb[(triton.cdiv(n, BLOCK),)](
            delta, gradient, x, out, *places, alpha, 0.0 if radius is None else radius, n, x.shape[1],
            PROJECT=radius is not None, TENSOR_A=isinstance(alpha, Tensor), TENSOR_R=isinstance(radius, Tensor), B=BLOCK,
            **seen,
        )  # fmt: skip
    return out


def start(uniform: Tensor, x: Tensor, radius: float | Tensor, clip: bool, sees: Sees | None = None) -> Tensor:
    """A perturbation out of numbers that are uniform in [0, 1). sees: as in `climb`."""
    (out, places, seen), n = _made(x, sees), x.numel()
    with torch.cuda.device_of(x):
        _start[(triton.cdiv(n, BLOCK),)](
            uniform, x, out, *places, radius, n, x.shape[1], CLIP=clip, TENSOR_R=isinstance(radius, Tensor), B=BLOCK, **seen
        )
    return out
