"""Convolutions of small images as matrix products, in bf16 on a CPU with AMX.

AMX multiplies tiles of 16 rows. oneDNN fills them along a row of an image, so that 4 pixels fill a quarter of a tile. Here
every position of every image is a row of one large matrix, and its 9 neighbours with all their channels are the columns.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrobust.runtime.half import has_bf16

SIDE, CHANNELS = 4, 64  # of outputs: pixels at most, channels at least


@cache
def have_amx() -> bool:
    return has_bf16("amx_bf16")


def columns(x: Tensor, stride: int = 1) -> Tensor:
    """(N h w) x 9C: what each output of a convolution of 3 x 3 pixels with a border of zeros sees. x: N x C x H x W."""
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    image, row, pixel, _ = padded.stride()
    shape = n, -(-height // stride), -(-width // stride), 3, 3 * channels
    return padded.as_strided(shape, (image, stride * row, stride * pixel, row, 1)).reshape(-1, 9 * channels)


def _images(products: Tensor, n: int, height: int, width: int) -> Tensor:
    return products.view(n, height, width, -1).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """With a stride of 2 only the weights' gradient is a product: for the others oneDNN is as fast."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        if stride > 1:
            return torch.conv2d(x, weight, None, stride, 1)
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # a view, in channels-last memory
        return _images(columns(x) @ matrix.T, len(x), *x.shape[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), (of_x, of_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        dx = dweight = None
        dy = dy.contiguous(memory_format=torch.channels_last)
        if of_x and ctx.stride > 1:
            wanted = [True, False, False]
            given = dy, x, weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, wanted
            dx = torch.ops.aten.convolution_backward(*given)[0]
        elif of_x:
            mirrored = weight.permute(2, 3, 0, 1).reshape(9, -1, weight.shape[1]).flip(0)
            matrix = mirrored.reshape(-1, weight.shape[1])
            dx = _images(columns(dy) @ matrix, len(x), *x.shape[2:])
        if of_weight:
            found = dy.permute(0, 2, 3, 1).reshape(-1, len(weight)).T @ columns(x, ctx.stride)
            dweight = found.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return dx, dweight, None


class Products(TorchFunctionMode):
    """A context in which convolutions that gain by it are computed this way. They cannot be differentiated twice."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.conv2d and not named and fits(*arguments):
            x, weight, bias, stride = arguments[:4]
            stride = stride if isinstance(stride, int) else stride[0]
            y = _Convolution.apply(x, weight.to(x.dtype), stride)
            return y if bias is None else y + bias.to(y.dtype)[:, None, None]
        return function(*arguments, **(named or {}))


def fits(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    """Whether torch.conv2d with these arguments is a convolution of 3 x 3 pixels with a border of one zero, of many channels
    and to few pixels, in bf16 on a CPU."""
    pair = lambda value: (value, value) if isinstance(value, int) else tuple(value)
    plain = groups == 1 and pair(dilation) == pair(padding) == (1, 1) and pair(stride) in ((1, 1), (2, 2))
    alike = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dim() == 4 and x.numel() > 0
    if not (plain and alike and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= CHANNELS):
        return False
    return max(x.shape[2:]) <= SIDE * pair(stride)[0]
