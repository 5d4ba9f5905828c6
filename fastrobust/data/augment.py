"""From a batch of stored uint8 images to what the model is trained on, on the batch's own device and in fixed shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]; keeps the memory format."""
    return images.float() / 255


def augment(images: Tensor, config, resolution: int) -> Tensor:
    """Crop and flip as a config's `data.augment` says. images: uint8, N x C x H x W; returns fp32 in [0, 1],
    N x C x resolution x resolution. The random numbers are the device's default generator's."""
    if config.crop == "random_resized":
        return random_resized_crop(to_unit(images), resolution, config.flip)
    if config.crop == "pad" or config.flip:
        images = pad_crop_flip(images, config.padding if config.crop == "pad" else 0, config.flip)
    return to_unit(images)


def pad_crop_flip(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Every image shifted by up to `padding` pixels in each direction, zeros coming in, then mirrored with probability
    1/2: one gather for the whole batch."""
    n, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(2 * padding + 1, (2, n, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    if flip:
        mirrored = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = left + columns
    batch = torch.arange(n, device=device)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_resized_crop(images: Tensor, resolution: int, flip: bool) -> Tensor:
    """A crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, resized bilinearly (the ImageNet recipe).
    Where the drawn crop would leave the image its sides are cut to fit. images: float, N x C x H x W."""
    n, channels, height, width = images.shape
    device = images.device
    area = torch.empty(n, device=device).uniform_(0.08, 1.0) * (height * width)
    ratio = torch.exp(torch.empty(n, device=device).uniform_(-0.28768207, 0.28768207))  # log of 3/4 and 4/3
    crop_w = (area * ratio).sqrt().clamp(max=width) / width
    crop_h = (area / ratio).sqrt().clamp(max=height) / height
    shift_x, shift_y = torch.empty(2, n, device=device).uniform_(-1, 1)
    if flip:
        sign = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    else:
        sign = torch.ones(n, device=device)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = crop_w * sign
    theta[:, 0, 2] = shift_x * (1 - crop_w)
    theta[:, 1, 1] = crop_h
    theta[:, 1, 2] = shift_y * (1 - crop_h)
    grid = F.affine_grid(theta, [n, channels, resolution, resolution], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def center_crop(images: Tensor, resolution: int) -> Tensor:
    """The middle resolution x resolution pixels, as used by evaluation and by the guard. Keeps the dtype."""
    top = (images.shape[2] - resolution) // 2
    left = (images.shape[3] - resolution) // 2
    return images[:, :, top : top + resolution, left : left + resolution]
