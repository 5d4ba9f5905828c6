"""From a batch of stored uint8 images to what the model is trained on, on the batch's own device and in fixed shapes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.data import order
from fastrobust.data.order import AREA, DRAWS, FLIP, RATIO, TRIES
from fastrobust.data.rand_augment import rand_augment


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]; images that are in [0, 1] already are left as they are. Keeps the memory format."""
    return images.float() if images.is_floating_point() else images.float() / 255


def augment(
    images: Tensor, config, resolution: int, kernels: bool = False, crop: bool = True, mirrored: Tensor | None = None
) -> Tensor:
    """Crop, flip, RandAugment and cutout as a config's `data.augment` says. images: uint8, N x C x H x W; returns fp32 in
    [0, 1], N x C x resolution x resolution. The random numbers are the device's default generator's. kernels: `pad` and
    flips run as one Triton kernel, with the same numbers. crop: false for images that were cropped and mirrored before.
    mirrored: with `flip: alternate`, which images are (bool N)."""
    if crop and config.crop == "random_resized":
        images = random_resized_crop(to_unit(images), resolution, config.flip)
    elif crop and (config.crop == "pad" or config.flip):
        padding = config.padding if config.crop == "pad" else 0
        images = pad_crop_flip(images, padding, config.flip, kernels, config.border == "reflect", mirrored)
    x = to_unit(images)
    if config.randaugment:
        x = rand_augment(x, config.randaugment, config.magnitude)
    return cutout(x, config.cutout) if config.cutout else x


def pad_crop_flip(
    images: Tensor,
    padding: int,
    flip: bool,
    kernels: bool = False,
    reflect: bool = False,
    mirrored: Tensor | None = None,
) -> Tensor:
    """Every image shifted by up to `padding` pixels in each direction, zeros coming in, or with `reflect` what lies inside;
    then mirrored with probability 1/2, or where `mirrored` (bool N) says so: one gather for the whole batch. With kernels
    the result is in [0, 1] already."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, n, 1), device=device)
    draw = None  # below 1/2: mirrored
    if flip:
        draw = torch.rand(n, 1, device=device) if mirrored is None else torch.where(mirrored, 0.0, 1.0)[:, None]
    if kernels and not reflect:
        from fastrobust.data import augment_kernels

        if augment_kernels.fit(images):
            return augment_kernels.shift_flip(images, top, left, draw, padding)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    if draw is not None:
        columns = torch.where(draw < 0.5, width - 1 - columns, columns)
    columns = left + columns
    if reflect:
        rows, columns = (size - 1 - (size - 1 - (i - padding).abs()).abs() for i, size in ((rows, height), (columns, width)))
    else:
        images = F.pad(images, (padding,) * 4)
    batch = torch.arange(n, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Alternation:
    """`flip: alternate` (as in the fast CIFAR-10 trainings): half of the images, drawn once, are mirrored in the first pass
    over the data, the others in the second, and so on. starts: where each update's batch begins in the stream of all passes
    (int64); the batch is that of all processes, of which this is number `rank`."""

    def __init__(self, starts: Tensor, examples: int, seed: int, rank: int, device: torch.device):
        draws = torch.rand(examples, generator=torch.Generator().manual_seed(seed))
        self.starts, self.rank, self.first = starts.to(device), rank, (draws < 0.5).to(device)

    def mirrored(self, start: Tensor, index: Tensor) -> Tensor:
        """bool N. start: the entry of `starts`; index: the images' numbers in the data set."""
        place = start + self.rank * len(index) + torch.arange(len(index), device=index.device)
        return self.first[index] ^ (place // len(self.first) % 2 == 1)


def within(first: Tensor, count: Tensor | int, size: int) -> Tensor:
    """Which of `size` places are among the `count` from `first` on. first, count: N x 1; returns bool N x size."""
    places = torch.arange(size, device=first.device)
    return (places >= first) & (places < first + count)


def cutout(x: Tensor, side: int) -> Tensor:
    """Of every image a square is black whose middle is anywhere in it (DeVries and Taylor, 2017): parts of it may lie
    outside. x: float, N x C x H x W."""
    n, _, height, width = x.shape
    top, left = (torch.randint(size, (n, 1), device=x.device) - side // 2 for size in (height, width))
    hole = within(top, side, height)[:, None, :, None] & within(left, side, width)[:, None, None, :]
    return torch.where(hole, 0.0, x)


def mixed(x: Tensor, labels: Tensor, classes: int, config) -> tuple[Tensor, Tensor]:
    """Every image with the one before it in the batch, whose order is random: the images, and their labels as float N x
    classes. `mixup` (Zhang et al., 2018) adds them, `cutmix` (Yun et al., 2019) puts a rectangle of the other in. The share
    is drawn once for the batch, from Beta(alpha, alpha). x: float, N x C x H x W; labels: int64 N."""
    height, width = x.shape[2:]
    alpha = torch.full((), config.mixup or config.cutmix, device=x.device)
    share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
    other, label = before(x), (labels[:, None] == torch.arange(classes, device=x.device)).float()
    if config.mixup:
        x = torch.lerp(other, x, share)
    else:
        sides = [((1 - share).sqrt() * size).long() for size in (height, width)]
        top, left = (torch.randint(size, (1, 1), device=x.device) for size in (height, width))
        rows, columns = within(top - sides[0] // 2, sides[0], height), within(left - sides[1] // 2, sides[1], width)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        x, share = torch.where(inside, other, x), 1 - inside.float().mean()
    return x, torch.lerp(before(label), label, share)


def before(t: Tensor) -> Tensor:
    """The row before each, the last before the first; in the memory format of t."""
    return torch.cat([t[-1:], t[:-1]])


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
