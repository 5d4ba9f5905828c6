"""What counts: which images are classified correctly, and which points break a model."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.attack.gradient import frozen
from fastrobust.attack.threat import Threat
from fastrobust.data.augment import to_unit
from fastrobust.runtime.errors import ConfigError, DataError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no weight gradients inside; every module's mode is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with frozen(model):
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Verdicts:
    """Per example, bool N: `clean`, classified correctly; `robust`, correctly at every point that the attack visited."""

    clean: Tensor
    robust: Tensor


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Which rows of logits name their label (bool, N). A row that is not finite names none."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def check_logits(logits: Tensor) -> None:
    """Raise ConfigError for probabilities (N x classes): their gradients vanish where a softmax saturates, so that attacks
    on them break less than they could, and training on them learns less."""
    logits = logits.detach().cpu().double()
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        raise ConfigError(
            "the model gives probabilities, and needs to give logits: leave out the softmax at its end, or give the "
            "logarithm of what it gives"
        )


def check_images(images: Tensor, labels: Tensor, threat: Threat | None = None) -> None:
    """Raise DataError unless images are uint8, or float in [0, 1], N x C x H x W, labels int64 N, and the radius is one of
    pixels in [0, 1]."""
    if images.dim() != 4 or not len(images):
        raise DataError(f"images must be N x C x H x W, not {' x '.join(map(str, images.shape))}")
    if images.is_floating_point():
        low, high = images.min().item(), images.max().item()
        if not (isfinite(low) and isfinite(high)):
            bad = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
            raise DataError(f"{len(bad)} images have pixels that are no finite numbers, the first is image {bad[0]}")
        if not (low >= 0 and high <= 1):
            hint = "divide them by 255" if low >= 0 and high > 2 else "normalisation belongs into the model"
            raise DataError(f"float images must be pixels in [0, 1], these lie in [{low:.3g}, {high:.3g}]: {hint}")
    elif images.dtype != torch.uint8:
        raise DataError(f"images must be uint8, or float in [0, 1], not {images.dtype}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or labels.min() < 0:
        found = f"{labels.dtype} {tuple(labels.shape)}, the least {labels.min().item()}" if len(labels) else "none"
        raise DataError(f"labels must be int64, one of at least 0 for each of the {len(images)} images; found {found}")
    if threat is None:
        return
    radius, widest = float(threat.radius), threat.widest(images.shape[1:])
    if not 0 <= radius <= widest:
        range_ = "the pixel range [0, 1]" if widest == 1 else f"0 to {widest:.4g}"
        raise DataError(f"epsilon {radius:g} is outside {range_}; did you mean {radius:g}/255?")


def classified(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    after: Callable[[int], None] = lambda examples: None,
) -> Tensor:
    """Which examples are classified correctly (bool, N), in fp32 and eval mode. images: uint8 N x C x H x W. `after` hears
    of every batch how many it had."""
    right = []
    with evaluating(model), plain_fp32(), torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(to_unit(x))
            if not right and labels.max() >= logits.shape[1]:
                most, classes = labels.max().item(), logits.shape[1]
                raise DataError(f"label {most} is none of the model's {classes} classes, 0 to {classes - 1}")
            right.append(correct(logits, y))
            after(len(y))
    return torch.cat(right)


@contextlib.contextmanager
def plain_fp32() -> Iterator[None]:
    """Full fp32 on a GPU: else convolutions may round their inputs to TF32's 10 bits, and matrix products if told to."""
    places, name, plain = _tf32()
    before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, plain)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def _tf32() -> tuple[tuple, str, Any]:
    """Where torch keeps whether convolutions and matrix products may use TF32, under which name, and what means no. Since
    torch 2.9 the old name cannot be read where the new one was set."""
    if hasattr(torch.backends.cudnn, "conv"):
        return (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul), "fp32_precision", "ieee"
    return (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", False


def arithmetic(device: torch.device) -> str:
    """What attack steps, and training with `precision: fp32`, compute in: on a GPU convolutions take TF32, with 10 bits of
    mantissa, unless that is switched off. Clean accuracy and the check of every success are fp32 whatever this says."""
    (convolutions, *_), name, _ = _tf32()
    possible = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    allowed = getattr(convolutions, name) in (True, "tf32") and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    return "tf32" if possible and allowed else "fp32"


TOLERANCE = 1e-6  # of a pixel in [0, 1]: what rounding in fp32 may add to epsilon or to the box, and more than it does


def breaks(model: nn.Module, x: Tensor, y: Tensor, points: Tensor, threat: Threat, full: int = 0) -> Tensor:
    """Which points count as adversarial examples of x (bool, N), whoever found them. A point further than TOLERANCE from
    the ball or the box is refused; one within it is moved to the ball and the box, and a plain forward pass in fp32
    must misclassify it there. The model is in eval mode. x, points: float N x C x H x W. Fewer than `full` are filled up to
    so many before they pass through the model."""
    with torch.no_grad(), plain_fp32(), torch.autocast(x.device.type, enabled=False):
        x, points = x.float(), points.float()
        logits = model(filled(threat.nearest(points, x), full))[: len(x)]
        return threat.contains(points, x, TOLERANCE) & ~correct(logits, y)


def filled(t: Tensor, size: int) -> Tensor:
    """t, repeated until it has `size` rows, in its own memory format. It has at least one."""
    return t[torch.arange(size, device=t.device) % len(t)] if len(t) < size else t
