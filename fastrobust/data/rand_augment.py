"""RandAugment (Cubuk et al., 2020) on the batch's device: torchvision's operations and magnitudes, but for sharpness and
equalize. Every image draws operations of its own; all of them are computed for all images, and nothing waits for a draw."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 31  # magnitudes from 0 to 30
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "posterize", "solarize", "autocontrast"),
)


def rand_augment(x: Tensor, count: int, magnitude: int) -> Tensor:
    """`count` operations, one after the other, at a magnitude of 0 to 30. Of an operation's two directions one is drawn.
    x: float in [0, 1], N x C x H x W in channels-last memory, as is what is returned."""
    for _ in range(count):
        drawn = torch.randint(len(OPERATIONS), (len(x),), device=x.device)
        sign = torch.randint(2, (len(x),), device=x.device) * 2.0 - 1
        x = applied(x, drawn, sign, magnitude)
    return x


def applied(x: Tensor, drawn: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """The operation OPERATIONS[drawn[k]] on image k, in the direction sign[k] (float, 1 or -1)."""
    share, (height, width) = magnitude / (BINS - 1), x.shape[2:]
    colours = [drawn == OPERATIONS.index(name) for name in OPERATIONS[6:]]
    brighter, coloured, contrasted, posterized, solarized, stretched = (one[:, None, None, None] for one in colours)
    x = moved(x, drawn, sign, share, height, width)
    factor = (1 + 0.9 * share * sign)[:, None, None, None]
    grey = luma(x)
    other = torch.where(coloured, grey, torch.where(contrasted, grey.mean((1, 2, 3), keepdim=True), 0.0))
    blended = (factor * x + (1 - factor) * other).clamp(0, 1)
    found = torch.where(brighter | coloured | contrasted, blended, x)
    levels = 2.0 ** round(magnitude / ((BINS - 1) / 4))  # of 256, that become one
    found = torch.where(posterized, ((255 * x).round() / levels).floor() * levels / 255, found)
    found = torch.where(solarized & (x >= 1 - share), 1 - x, found)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    whole = torch.where(high > low, (x - low) / (high - low).clamp(min=1e-9), x).clamp(0, 1)
    return torch.where(stretched, whole, found).contiguous(memory_format=torch.channels_last)


def moved(x: Tensor, drawn: Tensor, sign: Tensor, share: float, height: int, width: int) -> Tensor:
    """Shear about the upper left corner, translation by whole pixels, rotation about the middle; bilinear, zeros come in."""

    def where(name: str, amount: float) -> Tensor:
        return torch.where(drawn == OPERATIONS.index(name), amount * sign, 0.0)

    shear_x, shear_y, angle = (
        where("shear_x", 0.3 * share),
        where("shear_y", 0.3 * share),
        where("rotate", math.pi / 6 * share),
    )
    right = where("translate_x", math.floor(150 / 331 * width * share))
    down = where("translate_y", math.floor(150 / 331 * height * share))
    # where a pixel comes from, in pixels from the middle
    theta = torch.stack(
        [
            torch.stack(
                [angle.cos(), (shear_x - angle.sin()) * height / width, shear_x * height / width - 2 * right / width], 1
            ),
            torch.stack(
                [(shear_y + angle.sin()) * width / height, angle.cos(), shear_y * width / height - 2 * down / height], 1
            ),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    still = (drawn == 0) | (drawn > OPERATIONS.index("rotate"))
    return torch.where(still[:, None, None, None], x, F.grid_sample(x, grid, align_corners=False))


def luma(x: Tensor) -> Tensor:
    """N x 1 x H x W of 1 or 3 channels."""
    return x if x.shape[1] == 1 else 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
