"""Between images in [0, 1] and what a network takes: the normalisation of each channel, as one kernel where asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Sees(NamedTuple):
    """How a network sees images: mean and standard deviation of each channel (fp32), and the dtype of its passes."""

    mean: Tensor
    std: Tensor
    dtype: torch.dtype


class Seen(Tensor):
    """Images as the network behind a `Normalized` takes them. What is computed from them is a plain tensor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
            if function is Tensor.requires_grad_:
                return args[0]  # another view of it would be no leaf: it would get no gradient
            return out.as_subclass(Seen) if function is Tensor.detach else out


class Normalized(nn.Module):
    """(x - mean) / std per channel, then `network`. x: N x C x H x W in [0, 1]. classes: the names of the logits, where they
    are known."""

    classes: tuple[str, ...] | None = None

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


class KernelNormalized(Normalized):
    """The same by a kernel, in the precision of the passes. x may be `Seen`: then the network takes it as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Seen):
            with torch._C.DisableTorchFunctionSubclass():
                x = x.as_subclass(Tensor)
        elif x.device == self.mean.device and _fit(x):
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            x = _Normalise.apply(x, self.mean, self.std, dtype)
        else:
            return super().forward(x)
        return self.network(x)


def _fit(x: Tensor) -> bool:
    """Whether the kernel can read this."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and x.dtype == torch.float32 and x.numel() < 2**31 - 2**16


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
        from fastrobust.models import pixel_kernels  # needs Triton

        ctx.save_for_backward(std)
        with torch.cuda.device_of(x):
            return pixel_kernels.normalise(x, Sees(mean, std, dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient / ctx.saved_tensors[0], None, None, None  # fp32, whatever the gradient is: one kernel
