"""Sound bounds on the values inside a ReLU network over a box of inputs.

Intervals first (Gowal et al., 2018), then linear relaxation carried backward to the input (CROWN, Zhang et al., 2018), with
slopes that can be optimised (alpha-CROWN, Xu et al., 2021) and multipliers for ReLUs whose sign is fixed (beta-CROWN, Wang
et al., 2021). Everything is in double precision. A bound of this module differs from its value in exact arithmetic by the
rounding of a few thousand additions of numbers of moderate size, some 1e-11; callers ask for a margin of 1e-6.

Boxes are pairs (lower, upper) of tensors, B x shape, of normalised pixels. `hidden` is a list of such pairs, one for the
values before each ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.verification.network import DTYPE, Network

Box = tuple[Tensor, Tensor]


def intervals(network: Network, box: Box) -> list[Box]:
    """Interval bounds on the outputs of every layer."""
    found, (lower, upper) = [], box
    for layer in network.layers:
        centre, radius = (upper + lower) / 2, (upper - lower) / 2
        centre = layer.linear(centre) + layer.shift()
        radius = layer.linear(radius, layer.weight.abs())
        lower, upper = centre - radius, centre + radius
        found.append((lower, upper))
        lower, upper = lower.clamp(min=0), upper.clamp(min=0)
    return found


def relu_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ReLU over [lower, upper] lies under slope * z + offset and over low * z: (slope, offset, low). For an unstable
    one, `low` is 0 or 1, whichever leaves the smaller triangle."""
    up, down = upper.clamp(min=0), lower.clamp(max=0)
    slope = up / (up - down).clamp(min=1e-30)
    return slope, -slope * down, ((up > -down) | (lower >= 0)).to(lower.dtype)


def crown(network: Network, box: Box) -> list[Box]:
    """Bounds on the outputs of every layer but the last, by linear relaxation, never looser than intervals."""
    hidden: list[Box] = []
    for k, layer in enumerate(network.layers[:-1]):
        lower, upper = box if k == 0 else (side.clamp(min=0) for side in hidden[-1])
        centre, radius = (upper + lower) / 2, (upper - lower) / 2
        centre = layer.linear(centre) + layer.shift()
        radius = layer.linear(radius, layer.weight.abs())
        lower, upper = centre - radius, centre + radius
        if k > 0:
            tighter = _patches(network, k, hidden, box) if all(a.is_conv for a in network.layers[: k + 1]) else None
            if tighter is None:
                rows = layer.weight if not layer.is_conv else torch.eye(lower[0].numel(), dtype=DTYPE)
                tighter = _dense(network, k, rows, hidden, box)
            lower = torch.maximum(lower, tighter[0].reshape(lower.shape))
            upper = torch.minimum(upper, tighter[1].reshape(upper.shape))
        hidden.append((lower, upper))
    return hidden


def _dense(network: Network, k: int, rows: Tensor, hidden: list[Box], box: Box) -> Box:
    """Bounds on the outputs of layer k. rows: its weight (linear), or the identity on its outputs (convolution)."""
    batch, layer = len(box[0]), network.layers[k]
    if layer.is_conv:
        rows, shift = layer.transposed(rows), layer.shift().flatten()
    else:
        shift = layer.bias
    rows = rows.reshape(1, len(rows), -1).expand(batch, -1, -1)
    lower = below(network, k, rows, hidden, box) + shift
    upper = -below(network, k, -rows, hidden, box) + shift
    return lower, upper


def below(
    network: Network,
    k: int,
    rows: Tensor,
    hidden: list[Box],
    box: Box,
    low: list[Tensor] | None = None,
    push: list[Tensor | None] | None = None,
    coefficients: list[Tensor] | None = None,
) -> Tensor:
    """Lower bounds, B x R, on rows . relu(z) with z the output of layer k - 1 and rows B x R x (inputs of layer k).

    low: slopes of the lower lines, for every ReLU up to k - 1, B x (1 or R) x values, in [0, 1] where unstable; default those
    of `relu_lines`. push: for every ReLU, what is added to the coefficients of its inputs (B x R x values): a multiplier
    >= 0 times -1 where the input is known to be >= 0 and +1 where <= 0. `coefficients` collects those of every ReLU's
    output, from the last to the first.
    """
    batch, count = rows.shape[:2]
    total = torch.zeros(batch, count, dtype=rows.dtype)
    rows = rows.flatten(2)
    for i in range(k - 1, -1, -1):
        lower, upper = (side.reshape(batch, 1, -1) for side in hidden[i])
        slope, offset, line = relu_lines(lower, upper)
        if low is not None:
            line = torch.where((lower < 0) & (upper > 0), low[i], line)
        if coefficients is not None:
            coefficients.append(rows)
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        total = total + (negative @ offset.transpose(1, 2))[..., 0]
        rows = positive * line + negative * slope
        if push is not None and push[i] is not None:
            rows = rows + push[i]
        layer = network.layers[i]
        total = total + rows @ layer.shift().flatten()
        rows = layer.transposed(rows.reshape(batch * count, *layer.outputs)).reshape(batch, count, -1)
    lower, upper = (side.reshape(batch, -1, 1) for side in box)
    return total + (rows.clamp(min=0) @ lower + rows.clamp(max=0) @ upper)[..., 0]


def _patches(network: Network, k: int, hidden: list[Box], box: Box) -> Box:
    """As `_dense` for a convolution with nothing but convolutions under it: each of its outputs sees a patch of what lies
    under it, and the coefficients of that patch are all that is kept: B x channels x positions x patch."""
    layer = network.layers[k]
    sides = []
    for sign in (1.0, -1.0):
        channels, _, h, w = layer.weight.shape
        rows = (sign * layer.weight).reshape(1, channels, 1, -1)
        total = (sign * layer.bias).reshape(1, channels, 1)
        stride, padding = layer.stride, layer.padding

        def seen(x: Tensor, window=None) -> Tensor:
            """What each position sees of x: B x 1 x positions x patch."""
            (height, width), step, pad = window
            return F.unfold(x, (height, width), padding=pad, stride=step).transpose(1, 2).unsqueeze(1)

        for i in range(k - 1, -1, -1):
            window, under = ((h, w), stride, padding), network.layers[i]
            slope, offset, line = (seen(t, window) for t in relu_lines(*hidden[i]))
            positive, negative = rows.clamp(min=0), rows.clamp(max=0)
            total = total + (negative * offset).sum(3)
            rows = positive * line + negative * slope
            total = total + rows @ under.bias.repeat_interleave(h * w)
            basis = torch.eye(rows.shape[3], dtype=DTYPE).reshape(-1, len(under.bias), h, w)
            matrix = F.conv_transpose2d(basis, under.weight, None, under.stride)
            rows = rows @ matrix.flatten(1)
            h, w = matrix.shape[2:]
            stride, padding = stride * under.stride, padding * under.stride + under.padding
        lower, upper = (seen(side, ((h, w), stride, padding)) for side in box)
        value = total + (rows.clamp(min=0) * lower + rows.clamp(max=0) * upper).sum(3)
        sides.append(sign * value)
    return sides[0], sides[1]


def margin_rows(network: Network, labels: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The last layer's rows of logit[label] - logit[other], for every other class in order, or for `classes` (B x R):
    (rows, B x R x inputs; shifts, B x R)."""
    last = network.layers[-1]
    if classes is None:
        every = torch.arange(len(last.bias)).expand(len(labels), -1)
        classes = every[every != labels[:, None]].reshape(len(labels), -1)
    return last.weight[labels][:, None] - last.weight[classes], last.bias[labels][:, None] - last.bias[classes]


def margins(network: Network, hidden: list[Box], box: Box, labels: Tensor) -> Tensor:
    """Lower bounds on logit[label] - logit[other] for every other class in order, B x (classes - 1)."""
    rows, shifts = margin_rows(network, labels)
    return below(network, len(network.layers) - 1, rows, hidden, box) + shifts
