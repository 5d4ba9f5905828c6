"""The normalisation of images as a Triton kernel, alone and as a part of other kernels. Importing this needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrobust.models.pixels import Sees

BLOCK = 1024


@triton.jit
def store_seen(seen, v, i, n, mean, std, channels):
    """Stores images v, the elements i of n in channels-last memory, as a network sees them; with torch's rounding."""
    c = i % channels
    v = tl.div_rn(v - tl.load(mean + c), tl.load(std + c))
    tl.store(seen + i, v.to(seen.dtype.element_ty), i < n)


@triton.jit
def _normalise(x, seen, mean, std, channels, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    store_seen(seen, tl.load(x + i, i < n, 0.0), i, n, mean, std, channels)


def normalise(x: Tensor, sees: Sees) -> Tensor:
    """(x - mean) / std in the dtype of the passes. x: fp32, N x C x H x W in channels-last memory."""
    seen, n = torch.empty_like(x, dtype=sees.dtype), x.numel()
    _normalise[(triton.cdiv(n, BLOCK),)](x, seen, sees.mean, sees.std, x.shape[1], n, B=BLOCK)
    return seen
