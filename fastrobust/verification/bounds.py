"""Sound bounds on the values inside a ReLU network over boxes of inputs: what can be had for many images at once.

Intervals (Gowal et al., 2018), and linear relaxations carried backward to the input (CROWN, Zhang et al., 2018) for the
convolutions. Everything is in double precision; every bound that enters the next layer is widened by ROUNDING.

Boxes are pairs (lower, upper) of tensors, B x shape, of normalised pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.verification.network import DTYPE, Affine, Network

Box = tuple[Tensor, Tensor]
ROUNDING = 1e-9  # far above what the few thousand additions behind a bound lose in double precision (some 1e-12)


def interval(layer: Affine, box: Box) -> Box:
    """The outputs of a layer whose inputs lie in a box."""
    lower, upper = box
    centre = layer.linear((upper + lower) / 2) + layer.shift()
    radius = layer.linear((upper - lower) / 2, layer.weight.abs())
    return centre - radius, centre + radius


def intervals(network: Network, box: Box) -> list[Box]:
    """Interval bounds on the outputs of every layer."""
    found = []
    for layer in network.layers:
        found.append(interval(layer, box))
        box = tuple(side.clamp(min=0) for side in found[-1])
    return found


def relu_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ReLU over [lower, upper] lies under slope * z + offset and over low * z: (slope, offset, low). For an unstable
    one `low` is 0 or 1, whichever leaves the smaller triangle."""
    up, down = upper.clamp(min=0), lower.clamp(max=0)
    slope = up / (up - down).clamp(min=1e-30)
    return slope, -slope * down, ((up > -down) | (lower >= 0)).to(lower.dtype)


def first_layers(network: Network, box: Box) -> list[Box]:
    """Bounds on the outputs of the first layer and of every convolution after it, never looser than intervals."""
    hidden = [interval(network.layers[0], box)]
    for k, layer in enumerate(network.layers[1:-1], 1):
        if not layer.is_conv:
            break
        lower, upper = interval(layer, tuple(side.clamp(min=0) for side in hidden[-1]))
        relaxed = _relaxed(network, k, hidden, box)
        hidden.append((torch.maximum(lower, relaxed[0]) - ROUNDING, torch.minimum(upper, relaxed[1]) + ROUNDING))
    return hidden


def _relaxed(network: Network, k: int, hidden: list[Box], box: Box) -> Box:
    """Bounds on the outputs of convolution k, with nothing but convolutions under it. Each output sees a patch of what lies
    under it, and the coefficients of its patch are all that is kept: B x channels x positions x patch."""
    layer = network.layers[k]

    def seen(x: Tensor, size: tuple[int, int], stride: int, padding: int) -> Tensor:
        """What each position sees of x: B x 1 x positions x patch, zeros beyond the border."""
        return F.unfold(x, size, padding=padding, stride=stride).transpose(1, 2).unsqueeze(1)

    sides = []
    for sign in (1.0, -1.0):
        size, stride, padding = tuple(layer.weight.shape[2:]), layer.stride, layer.padding
        rows = (sign * layer.weight).reshape(1, len(layer.bias), 1, -1)
        total = (sign * layer.bias).reshape(1, -1, 1)
        for i in range(k - 1, -1, -1):
            slope, offset, low = (seen(t, size, stride, padding) for t in relu_lines(*hidden[i]))
            positive, negative = rows.clamp(min=0), rows.clamp(max=0)
            total = total + (negative * offset).sum(3)
            rows = positive * low + negative * slope  # zero beyond the border
            under = network.layers[i]
            total = total + rows @ under.bias.repeat_interleave(size[0] * size[1])
            basis = torch.eye(rows.shape[3], dtype=DTYPE).reshape(-1, len(under.bias), *size)
            matrix = F.conv_transpose2d(basis, under.weight, None, under.stride)  # a patch of z -> a larger patch under it
            rows = rows @ matrix.flatten(1)
            size, stride, padding = tuple(matrix.shape[2:]), stride * under.stride, padding * under.stride + under.padding
        lower, upper = (seen(side, size, stride, padding) for side in box)
        total = total + (rows.clamp(min=0) * lower + rows.clamp(max=0) * upper).sum(3)
        sides.append((sign * total).reshape(len(total), *layer.outputs))
    return sides[0], sides[1]
