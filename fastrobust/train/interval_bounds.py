"""Interval bound propagation (Gowal et al., 2018): what every perturbation can do to the logits, bounded by one more forward
pass that training can differentiate. For training only: these bounds are not rounded outward, verdicts come from
`fastrobust.verification`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.models import Normalized, in_sequence
from fastrobust.runtime.errors import ConfigError


def worst_differences(model: nn.Module, lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """Upper bounds on logit k minus logit y over the box between `lower` and `upper` (N x C x H x W, pixels in [0, 1]), N x
    classes; 0 where k = y. Their cross-entropy is an upper bound on that of every point of the box. Raises ConfigError for
    a model that is not a sequence of Conv2d, Linear, BatchNorm, average pooling, ReLU and Flatten with a Linear at its
    end. BatchNorm counts as in evaluation, with its running averages: so it is verified."""
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    if isinstance(model, Normalized):
        centre, radius, model = (centre - model.mean) / model.std, radius / model.std, model.network
    *layers, last = in_sequence(model)
    for layer in layers:
        centre, radius = _through(layer, centre, radius)
    if not isinstance(last, nn.Linear):
        raise _unsupported(last)
    rows = last.weight - last.weight[y][:, None]  # N x classes x features: tighter than the logits' own
    worst = torch.einsum("nkf,nf->nk", rows, centre) + torch.einsum("nkf,nf->nk", rows.abs(), radius)
    return worst if last.bias is None else worst + last.bias - last.bias[y][:, None]


def _through(layer: nn.Module, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius of the intervals behind a layer."""
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        weight = layer.weight.abs()
        return layer(centre), F.conv2d(radius, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.Linear):
        return layer(centre), F.linear(radius, layer.weight.abs())
    if isinstance(layer, nn.ReLU):
        lower, upper = (centre - radius).relu(), (centre + radius).relu()
        return (lower + upper) / 2, (upper - lower) / 2
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats and layer.affine:
        averages = layer.running_mean, layer.running_var
        steepness = layer.weight.abs() * (layer.running_var + layer.eps).rsqrt()
        moved = F.batch_norm(centre, *averages, layer.weight, layer.bias, False, 0.0, layer.eps)
        return moved, radius * steepness.view(-1, *[1] * (centre.dim() - 2))
    if isinstance(layer, nn.Flatten | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.Identity):
        return layer(centre), layer(radius)
    raise _unsupported(layer)


def _unsupported(layer: nn.Module) -> ConfigError:
    return ConfigError(
        f"method.ibp_weight: intervals are not carried through {type(layer).__name__}; they are through sequences of "
        "Conv2d, Linear, BatchNorm, average pooling, ReLU and Flatten that end with a Linear, such as mnist_net. Set "
        "ibp_weight to 0 for other models"
    )
