"""The arithmetic of an L-infinity attack between two passes, each part as one Triton kernel with the numbers of the
functions in `threat`. Importing this needs Triton; `Threat` does it where kernels are asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    delta, gradient, x, out, alpha, radius, n,
    PROJECT: tl.constexpr, TENSOR_A: tl.constexpr, TENSOR_R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * B + tl.arange(0, B)
    g, a = tl.load(gradient + i, i < n, 0.0), _number(alpha, TENSOR_A)
    d = tl.load(delta + i, i < n, 0.0) + tl.where(g > 0, a, tl.where(g < 0, -a, 0.0))
    if PROJECT:
        r = _number(radius, TENSOR_R)
        d = tl.minimum(tl.maximum(d, -r), r)
    tl.store(out + i, _boxed(d, tl.load(x + i, i < n, 0.0)), i < n)


@triton.jit
def _start(uniform, x, out, radius, n, CLIP: tl.constexpr, TENSOR_R: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    d = (tl.load(uniform + i, i < n, 0.0) * 2.0 - 1.0) * _number(radius, TENSOR_R)
    if CLIP:
        d = _boxed(d, tl.load(x + i, i < n, 0.0))
    tl.store(out + i, d, i < n)


def alike(*tensors: Tensor) -> bool:
    """Whether the kernels can walk through these side by side: fp32, one shape, one order of the elements, no gaps."""
    first = tensors[0]
    dense = first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
    same = all(t.shape == first.shape and t.stride() == first.stride() and t.dtype == torch.float32 for t in tensors)
    return dense and same and not any(t.requires_grad for t in tensors)


def climb(delta: Tensor, gradient: Tensor, x: Tensor, alpha: float | Tensor, radius: float | Tensor | None) -> Tensor:
    """clip_to_box(signed_step(delta, gradient, alpha), x); with a radius `project` instead."""
    out, n = torch.empty_like(delta), delta.numel()
    _climb[(triton.cdiv(n, BLOCK),)](
        delta, gradient, x, out, alpha, 0.0 if radius is None else radius, n,
        PROJECT=radius is not None, TENSOR_A=isinstance(alpha, Tensor), TENSOR_R=isinstance(radius, Tensor), B=BLOCK,
    )  # fmt: skip
    return out


def start(uniform: Tensor, x: Tensor, radius: float | Tensor, clip: bool) -> Tensor:
    """A perturbation out of numbers that are uniform in [0, 1)."""
    out, n = torch.empty_like(x), x.numel()
    _start[(triton.cdiv(n, BLOCK),)](uniform, x, out, radius, n, CLIP=clip, TENSOR_R=isinstance(radius, Tensor), B=BLOCK)
    return out
