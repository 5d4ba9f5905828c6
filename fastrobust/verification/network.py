"""A ReLU network of convolutions and linear layers as a list of affine layers, with a ReLU between each and the next."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.models import Normalized, in_sequence
from fastrobust.runtime.errors import FastrobustError

DTYPE = torch.float64


@dataclass(frozen=True)
class Affine:
    """z = W x + b from `inputs` (a shape without the batch) to `outputs`. weight: out x in for a linear layer, out x in x
    h x w for a convolution (one stride and one padding for both directions)."""

    weight: Tensor
    bias: Tensor
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stride: int = 1
    padding: int = 0

    @property
    def is_conv(self) -> bool:
        return self.weight.dim() == 4

    def linear(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """W x without the bias. x: N x inputs in any shape."""
        weight = self.weight if weight is None else weight
        x = x.reshape(len(x), *self.inputs)
        return F.conv2d(x, weight, None, self.stride, self.padding) if self.is_conv else F.linear(x, weight)

    def transposed(self, rows: Tensor) -> Tensor:
        """rows @ W: N x outputs -> N x inputs."""
        rows = rows.reshape(len(rows), *self.outputs)
        if not self.is_conv:
            return rows @ self.weight
        kernel = self.weight.shape[2:]
        left_over = [
            size - ((out - 1) * self.stride - 2 * self.padding + k)
            for size, out, k in zip(self.inputs[1:], self.outputs[1:], kernel, strict=True)
        ]
        return F.conv_transpose2d(rows, self.weight, None, self.stride, self.padding, left_over)

    def shift(self) -> Tensor:
        """The bias in the shape of the outputs."""
        return self.bias[:, None, None].expand(self.outputs) if self.is_conv else self.bias


@dataclass(frozen=True)
class Network:
    """Takes normalised pixels: (x - mean) / std."""

    layers: tuple[Affine, ...]
    mean: Tensor
    std: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        return (x.to(DTYPE) - self.mean) / self.std

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of normalised pixels, in double precision."""
        for i, layer in enumerate(self.layers):
            x = (x if i == 0 else x.clamp(min=0)).reshape(len(x), *layer.inputs)
            x = layer.linear(x) + layer.shift()
        return x


def extract(model: nn.Module, shape: tuple[int, ...]) -> Network:
    """The layers of a model in double precision. shape: of one image, C x H x W. Raises FastrobustError for anything but
    Conv2d, Linear, ReLU, Flatten and what does nothing in evaluation."""
    mean, std = torch.zeros(1, 1, 1, dtype=DTYPE), torch.ones(1, 1, 1, dtype=DTYPE)
    if isinstance(model, Normalized):
        mean, std, model = model.mean.to(DTYPE), model.std.to(DTYPE), model.network
    layers: list[Affine] = []
    activated = True  # the last thing seen was a ReLU, or the image itself
    for module in in_sequence(model):
        if isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)):
            if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
                raise FastrobustError("verification: Flatten must flatten everything but the batch")
        elif isinstance(module, nn.ReLU):
            if not layers or activated:
                raise FastrobustError("verification: a ReLU must follow a convolution or a linear layer")
            activated = True
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            if not activated:
                raise FastrobustError("verification: two layers follow each other without a ReLU between them")
            layers.append(_affine(module, layers[-1].outputs if layers else shape))
            activated = False
        else:
            raise FastrobustError(
                f"verification: {type(module).__name__} is not supported; networks of Conv2d, Linear, ReLU and Flatten are"
            )
    if not layers or activated:
        raise FastrobustError("verification: the network must end with a linear layer")
    if len(layers[-1].outputs) != 1:
        raise FastrobustError("verification: the network must end with a linear layer, not a convolution")
    return Network(tuple(layers), mean, std)


def _affine(module: nn.Module, inputs: tuple[int, ...]) -> Affine:
    weight = module.weight.detach().to(DTYPE).contiguous()
    outs = weight.shape[0]
    bias = torch.zeros(outs, dtype=DTYPE) if module.bias is None else module.bias.detach().to(DTYPE)
    if isinstance(module, nn.Linear):
        size = math.prod(inputs)
        if size != weight.shape[1]:
            raise FastrobustError(f"verification: a linear layer takes {weight.shape[1]} values, but gets {size}")
        return Affine(weight, bias, (size,), (outs,))
    (stride, other), padding = module.stride, module.padding
    plain = stride == other and module.dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros"
    if not plain or isinstance(padding, str) or padding[0] != padding[1] or len(inputs) != 3:
        raise FastrobustError(
            f"verification: {module} is not supported: one stride, one padding with zeros, no groups, no dilation"
        )
    sizes = [(size + 2 * padding[0] - k) // stride + 1 for size, k in zip(inputs[1:], weight.shape[2:], strict=True)]
    return Affine(weight, bias, tuple(inputs), (outs, *sizes), stride, padding[0])
