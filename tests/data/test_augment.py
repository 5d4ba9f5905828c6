"""Tests of fastrobust.data.augment: crops against all crops there can be, resampling against a slow bilinear one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastrobust.config import sections
from fastrobust.data import augment as augmentation
from fastrobust.data import order
from fastrobust.data.augment import augment, boxes, center_crop, pad_crop_flip, random_resized_crop, to_unit
from tests.gpusim import sim


def images(n: int, channels: int = 3, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    """uint8 in channels-last memory, no pixel zero, so that padding shows."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def settings(**keys) -> sections.Augment:
    return sections.Augment(**keys)


def test_to_unit_is_the_nearest_fp32_of_k_over_255():
    x = to_unit(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [float(np.float32(k / 255)) for k in range(256)]
    assert (x.flatten() * 255).round().tolist() == list(range(256))
    assert channels_last(to_unit(images(4)))


# ---- pad, crop, flip


def every_crop(image: np.ndarray, padding: int) -> dict[tuple[int, int, bool], np.ndarray]:
    """(down, right, mirrored) -> the crop, pixel by pixel: a pixel outside the image is zero. image: C x H x W."""
    _, height, width = image.shape
    crops = {}
    for down in range(-padding, padding + 1):
        for right in range(-padding, padding + 1):
            crop = np.zeros_like(image)
            for i in range(height):
                for j in range(width):
                    if 0 <= i + down < height and 0 <= j + right < width:
                        crop[:, i, j] = image[:, i + down, j + right]
            crops[down, right, False] = crop
            crops[down, right, True] = crop[:, :, ::-1]
    return crops


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (1, False), (0, True)])
def test_each_crop_is_one_of_all_crops_and_all_occur_equally_often(padding, flip):
    torch.manual_seed(0)
    originals, n = images(4), 600
    batch = originals.repeat(n, 1, 1, 1)
    out = pad_crop_flip(batch, padding, flip)
    assert out.shape == batch.shape and out.dtype == torch.uint8 and channels_last(out)
    kinds = [kind for kind in every_crop(originals[0].numpy(), padding) if flip or not kind[2]]
    counts = dict.fromkeys(kinds, 0)
    for k, image in enumerate(originals.numpy()):
        known = {crop.tobytes(): kind for kind, crop in every_crop(image, padding).items()}
        for crop in out[k::4].numpy():
            counts[known[np.ascontiguousarray(crop).tobytes()]] += 1  # an unknown crop is a KeyError
    expected = 4 * n / len(kinds)
    assert len(kinds) == (2 * padding + 1) ** 2 * (2 if flip else 1)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


def test_the_examples_of_a_batch_are_cropped_independently():
    torch.manual_seed(1)
    out = pad_crop_flip(images(1, height=8, width=8).repeat(64, 1, 1, 1), 3, True)
    assert len({crop.numpy().tobytes() for crop in out}) > 40
    again = pad_crop_flip(images(1, height=8, width=8).repeat(64, 1, 1, 1), 3, True)
    assert not torch.equal(out, again)


def test_no_crop_and_no_flip_is_the_same_image():
    x = images(5)
    assert torch.equal(pad_crop_flip(x, 0, False), x)
    assert torch.equal(augment(x, settings(), 6), to_unit(x))


def test_augment_does_what_the_config_says():
    torch.manual_seed(2)
    x = images(200, height=6, width=6)
    known = [{crop.tobytes(): kind for kind, crop in every_crop(image.numpy(), 1).items()} for image in x]
    found = {}
    for crop, flip in [("none", True), ("pad", False), ("pad", True)]:
        out = augment(x, settings(crop=crop, padding=1, flip=flip), 6)
        assert out.dtype == torch.float32 and out.shape == x.shape and channels_last(out)
        back = (out * 255).round().to(torch.uint8).numpy()
        kinds = [k[np.ascontiguousarray(image).tobytes()] for k, image in zip(known, back, strict=True)]
        found[crop, flip] = {(down, right) for down, right, _ in kinds}, {mirrored for _, _, mirrored in kinds}
    nine = {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    assert found == {
        ("none", True): ({(0, 0)}, {False, True}),
        ("pad", False): (nine, {False}),
        ("pad", True): (nine, {False, True}),
    }


@pytest.mark.parametrize("keys", [{"crop": "pad", "flip": True}, {"crop": "random_resized", "flip": True}])
def test_the_seed_decides(keys):
    x = images(16, height=8, width=8)
    torch.manual_seed(3)
    one = augment(x, settings(**keys), 8)
    torch.manual_seed(3)
    assert torch.equal(augment(x, settings(**keys), 8), one)
    assert not torch.equal(augment(x, settings(**keys), 8), one)


def test_one_channel():
    torch.manual_seed(4)
    x = images(3, channels=1, height=28, width=28)
    assert augment(x, settings(crop="pad", flip=True), 28).shape == (3, 1, 28, 28)
    assert augment(x, settings(crop="random_resized"), 14).shape == (3, 1, 14, 14)


# ---- random resized crop


def with_coordinates(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """fp32 images whose first two channels tell where a pixel is, (column + 0.5) / width and (row + 0.5) / height, and
    whose third is noise: bilinear interpolation of the first two gives the place that was sampled."""
    columns = ((torch.arange(width) + 0.5) / width).expand(height, width)
    rows = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    noise = torch.rand(n, height, width, generator=torch.Generator().manual_seed(seed))
    x = torch.stack([columns.expand(n, -1, -1), rows.expand(n, -1, -1), noise], 1)
    return x.contiguous(memory_format=torch.channels_last)


def boxes_seen(out: Tensor, height: int, width: int) -> list[tuple[float, float, float, float]]:
    """(left, top, width, height) of the crops in pixels of the source; a negative width is a mirrored crop. Read off
    two inner sample points, which the image's border does not touch."""
    side = out.shape[2]
    a, b = side // 2 - 1, side // 2
    found = []
    for crop in out.double():
        box = []
        for points, size in ((crop[0, a], width), (crop[1, :, a], height)):
            pitch = (points[b] - points[a]).item() * size
            start = points[a].item() * size - (a + 0.5) * pitch
            box.append((start, pitch * side))
        found.append((box[0][0], box[1][0], box[0][1], box[1][1]))
    return found


def test_resized_crops_lie_in_the_image_with_the_recipes_areas_and_ratios():
    """In an image so large that the rounding of boxes to whole pixels does not show."""
    torch.manual_seed(5)
    height, width, n = 400, 400, 2000
    x = with_coordinates(50, height, width)
    found = [box for _ in range(n // 50) for box in boxes_seen(random_resized_crop(x, 16, True), height, width)]
    areas, ratios, mirrored = [], [], 0
    for left, top, w, h in found:
        if w < 0:
            mirrored += 1
            left, w = left + w, -w
        assert left > -0.02 and top > -0.02 and left + w < width + 0.02 and top + h < height + 0.02
        areas.append(w * h / (width * height))
        ratios.append(w / h)
    assert 0.08 - 1e-3 < min(areas) < 0.09 and 0.95 < max(areas) <= 1 + 1e-3
    assert 0.75 - 1e-3 < min(ratios) < 0.77 and 1.3 < max(ratios) < 4 / 3 + 1e-3
    small = [(a, r) for a, r in zip(areas, ratios, strict=True) if a < 0.74]  # none of these is cut to fit
    uniform = sorted((a - 0.08) / 0.66 for a, _ in small)
    logs = sorted((math.log(r) / math.log(4 / 3) + 1) / 2 for _, r in small)
    for values in (uniform, logs):  # Kolmogorov-Smirnov at 0.1 %
        gap = max(abs(v - (k + 0.5) / len(values)) for k, v in enumerate(values))
        assert gap < 1.95 / math.sqrt(len(values))
    assert abs(mirrored - n / 2) < 4 * math.sqrt(n / 4)
    room = [(left + min(w, 0)) / (width - abs(w)) for left, _, w, _ in found if abs(w) < 0.8 * width]
    assert min(room) < 0.02 and max(room) > 0.98 and abs(sum(room) / len(room) - 0.5) < 0.03


def test_resized_crops_are_bilinear():
    """The noise channel, recomputed pixel by pixel at the places that the coordinate channels tell."""
    torch.manual_seed(6)
    height, width = 11, 9
    x = with_coordinates(12, height, width)
    out = random_resized_crop(x, 7, True)
    assert out.shape == (12, 3, 7, 7) and channels_last(out)
    for image, crop in zip(x[:, 2].tolist(), out.tolist(), strict=True):
        for i in range(7):
            for j in range(7):
                column = min(max(crop[0][i][j] * width - 0.5, 0.0), width - 1.0)
                row = min(max(crop[1][i][j] * height - 0.5, 0.0), height - 1.0)
                c, r = min(int(column), width - 2), min(int(row), height - 2)
                u, v = column - c, row - r
                upper = image[r][c] * (1 - u) + image[r][c + 1] * u
                lower = image[r + 1][c] * (1 - u) + image[r + 1][c + 1] * u
                assert crop[2][i][j] == pytest.approx(upper * (1 - v) + lower * v, abs=2e-5)


def crop_with(draws: Tensor, x: Tensor, resolution: int, flip: bool) -> Tensor:
    """random_resized_crop with these random numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: {tuple(draws.shape): draws}[shape])
        return random_resized_crop(x, resolution, flip)


def test_a_full_crop_at_the_same_size_is_the_image():
    """With every drawn number fixed: all of the area, a ratio of 1, no shift."""
    draws = torch.zeros(4, order.DRAWS, dtype=torch.float64)
    draws[:, : order.TRIES], draws[:, order.TRIES : 2 * order.TRIES] = 1.0, 0.5
    x = to_unit(images(4, height=8, width=8))
    torch.testing.assert_close(crop_with(draws, x, 8, False), x, rtol=0, atol=2e-6)


SHAPES = [(32, 32), (40, 40), (160, 213), (7, 5), (3, 4), (20, 300), (300, 20), (1, 40), (40, 1), (1, 1), (120, 161)]


def edges() -> np.ndarray:
    """Rows of equal draws at the ends of the range and in its middle, and with no fit but in the last try."""
    rows = [np.full(order.DRAWS, value) for value in (0.0, 0.5, 1 - 2**-53)]
    last = np.full(order.DRAWS, 1 - 2**-53)
    last[order.TRIES - 1] = 0.0
    return np.array([*rows, last])


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_boxes_are_those_of_the_loaders(height, width):
    """The same random numbers give the same boxes, on the device and in the loaders' code."""
    rng = np.random.default_rng([height, width])
    draws = np.concatenate([edges(), rng.random((4000, order.DRAWS))])
    expected = order.crop_boxes(draws, np.full(len(draws), height), np.full(len(draws), width))
    found = boxes(torch.from_numpy(draws), height, width)
    assert found.dtype == torch.int64 and found.tolist() == expected.tolist()
    top, left, h, w = found.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    assert (h > 0).all() and (w > 0).all()
    middle = (found == torch.tensor(order.middle_box(height, width))).all(1).float().mean()
    long = max(height, width) / min(height, width)
    if long > 10:  # no try fits in most images
        assert middle > 0.9 if min(height, width) == 1 else middle > 0.2
    elif min(height, width) > 30:
        assert middle < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(sim.HERE, reason="the simulated GPU computes nothing")
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_boxes_on_a_gpu_are_those_of_the_cpu(height, width):
    draws = torch.from_numpy(np.concatenate([edges(), np.random.default_rng(1).random((4000, order.DRAWS))]))
    found = boxes(draws.cuda(), height, width)
    assert found.is_cuda and torch.equal(found.cpu(), boxes(draws, height, width))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 53), (9, 90), (90, 9), (5, 5)])
@pytest.mark.parametrize("resolution", [4, 16])
def test_a_resized_crop_is_exactly_its_box(height, width, resolution):
    """On ramps a bilinear sample is the place of the sample: those of the box in equal steps, half a step from its edges,
    and no further out than the centres of the image's outer pixels."""
    n = 60
    draws = torch.from_numpy(np.random.default_rng([height, width, resolution]).random((n, order.DRAWS)))
    out = crop_with(draws, with_coordinates(n, height, width), resolution, True)
    steps = (np.arange(resolution) + 0.5) / resolution
    expected = order.crop_boxes(draws.numpy(), np.full(n, height), np.full(n, width)).tolist()
    mirrored = draws[:, order.FLIP] < 0.5
    assert 10 < mirrored.sum() < 50 and len({tuple(box) for box in expected}) > 8
    for crop, (top, left, h, w), flip in zip(out, expected, mirrored.tolist(), strict=True):
        columns = (left + steps * w).clip(0.5, width - 0.5) / width
        rows = (top + steps * h).clip(0.5, height - 0.5) / height
        columns = columns[::-1] if flip else columns
        np.testing.assert_allclose(crop[0].numpy(), np.tile(columns, (resolution, 1)), rtol=0, atol=5e-6)
        np.testing.assert_allclose(crop[1].numpy(), np.tile(rows[:, None], (1, resolution)), rtol=0, atol=5e-6)


def test_a_resized_crop_is_the_cut_box_resized():
    """Noise, against torch's own resizing of the box alone; shrinking, no sample reaches a pixel outside of the box."""
    n, height, width, resolution = 80, 60, 75, 9
    draws = torch.from_numpy(np.random.default_rng(0).random((n, order.DRAWS)))
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    out = crop_with(draws, x, resolution, True)
    expected = order.crop_boxes(draws.numpy(), np.full(n, height), np.full(n, width)).tolist()
    for image, crop, (top, left, h, w), draw in zip(x, out, expected, draws, strict=True):
        assert min(h, w) >= resolution
        cut = image[None, :, top : top + h, left : left + w]
        resized = F.interpolate(cut, (resolution, resolution), mode="bilinear", align_corners=False)[0]
        resized = resized.flip(2) if draw[order.FLIP] < 0.5 else resized
        torch.testing.assert_close(crop, resized, rtol=0, atol=2e-5)


def test_without_flip_no_crop_is_mirrored():
    torch.manual_seed(7)
    assert all(w > 0 for _, _, w, _ in boxes_seen(random_resized_crop(with_coordinates(200, 20, 20), 8, False), 20, 20))


@pytest.mark.parametrize(("height", "width", "resolution"), [(12, 12, 12), (40, 40, 16), (10, 14, 24)])
def test_resized_crops_have_one_shape_and_stay_in_range(height, width, resolution):
    torch.manual_seed(8)
    x = images(32, height=height, width=width)
    out = augment(x, settings(crop="random_resized", flip=True), resolution)
    assert out.shape == (32, 3, resolution, resolution) and out.dtype == torch.float32 and channels_last(out)
    assert out.min() >= 0 and out.max() <= 1 and out.std() > 0.1
    for k in (0, 51, 255):
        constant = augment(torch.full_like(x, k), settings(crop="random_resized", flip=True), resolution)
        torch.testing.assert_close(constant, torch.full_like(constant, k / 255), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "resolution", "first"), [(8, 8, 0), (8, 4, 2), (9, 4, 2), (9, 6, 1)])
def test_center_crop(side, resolution, first):
    x = images(2, height=side, width=side + 2)
    out = center_crop(x, resolution)
    assert out.dtype == torch.uint8 and out.shape == (2, 3, resolution, resolution)
    left = (side + 2 - resolution) // 2
    for i in range(resolution):
        for j in range(resolution):
            assert torch.equal(out[:, :, i, j], x[:, :, first + i, left + j])


def test_a_crop_that_is_shrunk_takes_the_nearest_pixels_and_no_mean():
    """Stripes one pixel wide, four times smaller: Pillow averages them to grey, as the loaders do; here they alias."""
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(64, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "boxes", lambda draws, height, width: torch.tensor([[0, 0, 62, 62]]))
        found = random_resized_crop(to_unit(stripes.expand(1, 3, 64, 64)), 16, False)
    averaged = Image.fromarray(stripes.numpy()).resize((16, 16), Image.Resampling.BILINEAR, box=(0, 0, 62, 62))
    assert np.asarray(averaged).std() < 10 and found.std() * 255 > 30
