"""From a batch of stored uint8 images to what the model is trained on, on the batch's own device and in fixed shapes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.data import order
from fastrobust.data.order import AREA, DRAWS, FLIP, RATIO, TRIES


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]; images that are in [0, 1] already are left as they are. Keeps the memory format."""
    return images.float() if images.is_floating_point() else images.float() / 255


def augment(images: Tensor, config, resolution: int, kernels: bool = False) -> Tensor:
    """Crop and flip as a config's `data.augment` says. images: uint8, N x C x H x W; returns fp32 in [0, 1],
    N x C x resolution x resolution. The random numbers are the device's default generator's. kernels: `pad` and flips run as
    one Triton kernel, with the same numbers."""
    if config.crop == "random_resized":
        return random_resized_crop(to_unit(images), resolution, config.flip)
    if config.crop == "pad" or config.flip:
        images = pad_crop_flip(images, config.padding if config.crop == "pad" else 0, config.flip, kernels)
    return to_unit(images)


def pad_crop_flip(images: Tensor, padding: int, flip: bool, kernels: bool = False) -> Tensor:
    """Every image shifted by up to `padding` pixels in each direction, zeros coming in, then mirrored with probability
    1/2: one gather for the whole batch. With kernels the result is in [0, 1] already."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, n, 1), device=device)
    if kernels:
        from fastrobust.data import augment_kernels

        if augment_kernels.fit(images):
            mirrored = torch.rand(n, 1, device=device) if flip else None
            return augment_kernels.shift_flip(images, top, left, mirrored, padding)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    if flip:
        mirrored = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = left + columns
    batch = torch.arange(n, device=device)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_resized_crop(images: Tensor, resolution: int, flip: bool) -> Tensor:
    """A random box of each image (`boxes`), resized bilinearly, then mirrored with probability 1/2 if `flip`. images: float,
    N x C x H x W."""
    n, channels, height, width = images.shape
    draws = torch.rand(n, DRAWS, device=images.device, dtype=torch.float64)
    top, left, h, w = (side.float() for side in boxes(draws, height, width).unbind(1))
    sign = 1 - 2 * (draws[:, FLIP] < 0.5).float() if flip else torch.ones(n, device=images.device)
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0] = w / width * sign
    theta[:, 0, 2] = (2 * left + w) / width - 1
    theta[:, 1, 1] = h / height
    theta[:, 1, 2] = (2 * top + h) / height - 1
    grid = F.affine_grid(theta, [n, channels, resolution, resolution], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def boxes(draws: Tensor, height: int, width: int) -> Tensor:
    """The boxes that `order.crop_boxes` takes out of images of one size with the same random numbers, on the draws' device
    and without waiting for it. draws: float64 N x DRAWS. int64 N x (top, left, height, width)."""
    area = (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :TRIES]) * (height * width)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = (low + (high - low) * draws[:, TRIES : 2 * TRIES]).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # where none fits, the middle at the nearest ratio
    (_, _, middle_h, middle_w), middle = order.middle_box(height, width), ~fits.any(1)
    w = torch.where(middle, float(middle_w), w.gather(1, first)[:, 0])
    h = torch.where(middle, float(middle_h), h.gather(1, first)[:, 0])
    top, left = draws[:, 2 * TRIES] * (height - h + 1), draws[:, 2 * TRIES + 1] * (width - w + 1)
    top = torch.where(middle, (height - h) / 2, top).floor()
    left = torch.where(middle, (width - w) / 2, left).floor()
    return torch.stack([top, left, h, w], 1).long()


def center_crop(images: Tensor, resolution: int) -> Tensor:
    """The middle resolution x resolution pixels, as used by evaluation and by the guard. Keeps the dtype."""
    top = (images.shape[2] - resolution) // 2
    left = (images.shape[3] - resolution) // 2
    return images[:, :, top : top + resolution, left : left + resolution]
