"""Networks with the same weights and other code are told apart by what they answer on two fixed images. The weights' digest
does not see another activation, scale or layer without weights: what is kept about a network has its answers beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrobust.attack.verdicts import evaluating, plain_fp32
from fastrobust.data.augment import to_unit

CLOSE = 0.02  # of the largest logit, or of the largest length: devices differ by far less
ROUNDED = 1e-3  # of the largest logit: lengths below that may be rounding


def answers(model: nn.Module, shape: Sequence[int]) -> list[float]:
    """The logits on two images of noise, C x H x W, and for each image the length of the gradient of a sum of its logits,
    each times a number from -1 to 1 (no gradient: 0). No softmax is in it: where that saturates, rounding decides."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # for models that draw numbers
        x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        with evaluating(model), plain_fp32(), torch.enable_grad():
            logits, gradient = model(x).float(), torch.zeros_like(x)
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad((logits @ torch.linspace(-1, 1, logits.shape[1], device=device)).sum(), x)
    lengths = gradient.flatten(1).norm(dim=1)
    return [float(f"{value:.5g}") for value in (*logits.flatten().tolist(), *lengths.tolist())]


def alike(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether these are the answers of one network. Results of earlier versions have none, and are believed; so are numbers
    that are not finite."""
    if one is None or other is None:
        return True
    if len(one) != len(other):
        return False
    largest = lambda numbers: max(map(abs, numbers))
    logits, lengths = largest((*one[:-2], *other[:-2])), largest((*one[-2:], *other[-2:]))
    scales = [logits] * len(one[:-2]) + 2 * [max(lengths, ROUNDED * logits)]
    return not any(abs(a - b) > CLOSE * scale for a, b, scale in zip(one, other, scales, strict=True))


def unsteady(model: nn.Module, images: Tensor) -> str | None:
    """Why accuracies of this model are not of its weights and images alone, or None. images: N x C x H x W, as stored."""
    device, x = next(model.parameters()).device, to_unit(images[:8])
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model), plain_fp32(), torch.no_grad():
        logits, again, alone = model(x).float(), model(x).float(), model(x[:1]).float()
    far = CLOSE * logits.abs().max()
    if ((again - logits).abs() > far).any():
        return "the model gives different answers for the same images (dropout?): accuracies hold for these draws alone"
    if ((alone - logits[:1]).abs() > far).any():
        return "the model's answers depend on the other images of a batch (BatchNorm?): accuracies hold for this batch size"
    return None
