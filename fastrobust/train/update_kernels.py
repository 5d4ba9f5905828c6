"""SGD on flat buffers as Triton kernels: half-precision gradients, fp32 masters and momentum, half-precision weights.
Importing this needs Triton; `fastrobust.train.shadow` does it where there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements for each program


@triton.jit
def _gradient(half, full, i, ok, cut):
    """Elements i of a gradient whose first `cut` elements are half precision and whose others are fp32."""
    ours = ok & (i < cut)
    return tl.where(
        i < cut, tl.load(half + i, ours, 0.0).to(tl.float32), tl.load(full + i - cut, ok & (i >= cut), 0.0).to(tl.float32)
    )


@triton.jit
def _check(half, full, found, n, cut, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    g = _gradient(half, full, i, i < n, cut)
    bad = tl.sum(((g - g) != 0).to(tl.int32), 0)  # infinity minus infinity is no number either
    if bad > 0:
        tl.store(found, 1.0)


@triton.jit
def _sgd(
    half_gradient, full_gradient, master, moment, half, lr, scale, found,
    begin, end, cut, decay, momentum, SCALED: tl.constexpr, MOMENTUM: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    factor, skip = 1.0, False
    if SCALED:
        factor, skip = 1.0 / tl.load(scale), tl.load(found) != 0  # the scale is a power of two: nothing is rounded
    if not skip:
        i = begin + tl.program_id(0) * B + tl.arange(0, B)
        ok = i < end
        weight = tl.load(master + i, ok, 0.0)
        step = _gradient(half_gradient, full_gradient, i, ok, cut) * factor + decay * weight
        if MOMENTUM:
            step += momentum * tl.load(moment + i, ok, 0.0)
            tl.store(moment + i, step, ok)
        weight -= tl.load(lr) * step
        tl.store(master + i, weight, ok)
        tl.store(half + i, weight.to(half.dtype.element_ty), ok & (i < cut))


def check(half: Tensor, full: Tensor, found: Tensor) -> None:
    """found (fp32, one element) becomes 1 if an element of the two gradients is infinite or no number."""
    n = len(half) + len(full)
    _check[(triton.cdiv(n, BLOCK),)](half, full, found, n, len(half), B=BLOCK)


def sgd(
    half_gradient: Tensor, full_gradient: Tensor, master: Tensor, moment: Tensor, half: Tensor,
    begin: int, end: int, decay: float, momentum: float, lr: Tensor, scale: Tensor | None, found: Tensor,
) -> None:  # fmt: skip
    """torch's SGD on elements begin to end of flat buffers, in place: unscale, weight decay, momentum, step, and the weight
    in half precision. With a scale nothing happens where `found` is 1."""
    _sgd[(triton.cdiv(end - begin, BLOCK),)](
        half_gradient, full_gradient, master, moment, half, lr, lr if scale is None else scale, found,
        begin, end, len(half), decay, momentum, SCALED=scale is not None, MOMENTUM=momentum != 0, B=BLOCK,
    )  # fmt: skip
