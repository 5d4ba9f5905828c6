"""Crop, flip and the step to [0, 1] as one Triton kernel. Importing this needs Triton; `augment` does it where kernels are
asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _shift_flip(
    images, out, top, left, mirrored, n, C, H, W, padding,
    FLIP: tl.constexpr, RECIPROCAL: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * B + tl.arange(0, B)
    c, w, h, image = i % C, i // C % W, i // C // W % H, i // C // W // H
    if FLIP:
        w = tl.where(tl.load(mirrored + image, i < n, 1.0) < 0.5, W - 1 - w, w)
    y = h + tl.load(top + image, i < n, 0).to(tl.int32) - padding
    x = w + tl.load(left + image, i < n, 0).to(tl.int32) - padding
    inside = (i < n) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    v = tl.load(images + ((image * H + y) * W + x) * C + c, inside, 0).to(tl.float32)
    v = v * (1.0 / 255) if RECIPROCAL else v / 255.0  # as torch divides by a number: on a GPU by its reciprocal
    tl.store(out + i, v, i < n)


def fit(images: Tensor) -> bool:
    """Whether the kernel can read these: uint8 in channels-last memory."""
    return images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)


def shift_flip(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None, padding: int) -> Tensor:
    """fp32 in [0, 1] from uint8, N x C x H x W in channels-last memory: image k shifted by (padding - top[k], padding -
    left[k]) with zeros coming in, after its mirroring where mirrored[k] < 0.5."""
    out, (_, c, h, w) = torch.empty_like(images, dtype=torch.float32), images.shape
    with torch.cuda.device_of(images):
        _shift_flip[(triton.cdiv(images.numel(), BLOCK),)](
            images, out, top, left, top if mirrored is None else mirrored, images.numel(), c, h, w, padding,
            FLIP=mirrored is not None, RECIPROCAL=images.is_cuda, B=BLOCK,
        )  # fmt: skip
    return out
