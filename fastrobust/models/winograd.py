"""Convolutions of 3 x 3 pixels and stride 1 by Winograd's minimal filtering, F(4 x 4, 3 x 3) of Lavin and Gray, "Fast
algorithms for convolutional neural networks", 2016: a tile of 4 x 4 outputs takes 36 products for each pair of channels
instead of 144. On a CPU, in fp32.

The products are 36 matrix products. What comes before and after them (`winograd_kernels.py`) is memory traffic, so it pays
where there are many channels. Sums are rounded at other places than in a plain convolution: the error of an output is about
1e-5 of the largest, some ten times that of a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastrobust.runtime import compiled
from fastrobust.runtime.shared_work import by_threads

CHANNELS, MANY = 64, 256  # of inputs and outputs: from which it pays, and of the largest layer for a whole model to gain
PLACES = 36  # of a tile of 6 x 6 pixels
_FILTER = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
]
_FILTER = torch.tensor([*_FILTER, [0, 0, 1]], dtype=torch.float64)
FILTER = torch.kron(_FILTER, _FILTER).float()  # 36 x 9: a filter's values where the products are taken


def convolved(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(the convolution with a border of zeros, N x K x H x W in channels-last memory; the transformed tiles of x).
    x: float32 N x C x H x W; weight: K x C x 3 x 3."""
    seen = _tiles(_kernels().of_inputs, x)
    return _joined(seen @ _placed(FILTER, weight).transpose(1, 2), x), seen


def of_inputs(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient with respect to x, from that with respect to the output: a convolution with the mirrored filters."""
    return _joined(_tiles(_kernels().of_inputs, dy) @ _placed(FILTER.flip(1), weight), dy)


def of_weights(seen: Tensor, dy: Tensor) -> Tensor:
    """The gradient with respect to the weight, from the tiles that `convolved` gave."""
    found = _tiles(_kernels().of_outputs, dy).transpose(1, 2) @ seen
    return (FILTER.T @ found.view(PLACES, -1)).view(3, 3, *found.shape[1:]).permute(2, 3, 0, 1)


def _placed(transform: Tensor, weight: Tensor) -> Tensor:
    """36 x K x C."""
    return (transform @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(PLACES, *weight.shape[:2])


def _tiles(kernel: Callable, x: Tensor) -> Tensor:
    """36 x (N h w) x C."""
    n, channels, height, width = x.shape
    out = x.new_empty(PLACES, n * -(-height // 4) * -(-width // 4), channels)
    _by_threads(kernel, x.permute(0, 2, 3, 1).contiguous(), out)
    return out


def _joined(products: Tensor, like: Tensor) -> Tensor:
    """Images of the size of `like`, N x K x H x W, from 36 x (N h w) x K."""
    n, _, height, width = like.shape
    y = products.new_empty(n, height, width, products.shape[2])
    _by_threads(_kernels().joined, y, products)
    return y.permute(0, 3, 1, 2)


def _by_threads(kernel: Callable, images: Tensor, tiles: Tensor) -> None:
    arrays = images.detach().numpy(), tiles.numpy()
    by_threads(lambda first, last: kernel(*arrays, first, last), len(images))


@cache
def _kernels():
    from fastrobust.models import winograd_kernels

    return winograd_kernels


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        y, seen = convolved(x, weight)
        ctx.save_for_backward(weight, seen if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (weight, seen), (of_x, of_weight) = ctx.saved_tensors, ctx.needs_input_grad
        return of_inputs(dy, weight) if of_x else None, of_weights(seen, dy) if of_weight else None


class Filtering(TorchFunctionMode):
    """A context in which convolutions that gain by it are computed this way. They cannot be differentiated twice."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.conv2d and not named and fits(*arguments) and not torch.is_autocast_enabled("cpu"):
            x, weight, bias = (*arguments, None)[:3]
            y = _Convolution.apply(x, weight)
            return y if bias is None else y + bias[:, None, None]
        return function(*arguments, **(named or {}))


def fits(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    """Whether torch.conv2d with these arguments is a convolution of 3 x 3 pixels with a border of one zero and of many
    channels, in fp32 on a CPU."""
    pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)
    plain = groups == 1 and pair(stride) == pair(dilation) == (1, 1) and (padding == "same" or pair(padding) == (1, 1))
    alike = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.dim() == 4 and x.numel() > 0
    return plain and alike and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= CHANNELS


def trouble(model: nn.Module, channels: int) -> str | None:
    """Why a model cannot gain, or None: it has no layer of so many channels, or there is no numba here."""
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1)
    if not any(m.kernel_size == (3, 3) and m.stride == (1, 1) and min(m.weight.shape[:2]) >= channels for m in layers):
        return f"the model has no convolution of 3 x 3 pixels, stride 1 and {channels} channels or more"
    return compiled.trouble(_kernels)
