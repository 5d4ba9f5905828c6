"""Tests of fastrobust.data.order: shares of processes, and crops against a slow loop."""

import math

import numpy as np
import pytest

from fastrobust.data.order import Order, middle_squares, random_crops, share

RNG = np.random.default_rng(0)


def slow_crop(height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, on given random numbers."""
    for k in range(10):
        area = height * width * (0.08 + 0.92 * draws[k])
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[10 + k])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_crops_are_torchvisions():
    heights, widths = RNG.integers(1, 400, (2, 3000))
    heights[:1000], widths[500:1500] = 20, 600  # long ones, for which no draw may fit
    boxes, flips = random_crops(heights, widths, 5, 2, 1000)
    draws = np.random.Generator(np.random.Philox(key=[5, 2], counter=6000)).random((3000, 24))
    expected = [slow_crop(*each) for each in zip(heights.tolist(), widths.tolist(), draws, strict=True)]
    assert boxes.tolist() == [list(box) for box in expected]
    assert flips.tolist() == (draws[:, 22] < 0.5).tolist()
    top, left, h, w = boxes.T
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= heights).all() and (left + w <= widths).all()


def expected_area() -> float:
    """The mean area of a crop of a square: areas a in U(0.08, 1) at log-ratios in U(log 3/4, log 4/3) that fit, a r <= 1 and
    a / r <= 1, by summing over a grid."""
    area, ratio = np.meshgrid(np.linspace(0.08, 1, 1001), np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 1001)))
    return area[(area * ratio <= 1) & (area / ratio <= 1)].mean()


def test_crops_have_the_recipes_distribution():
    size = np.full(20_000, 500)
    (top, left, h, w), flips = random_crops(size, size, 0, 0, 0)[0].T, random_crops(size, size, 0, 0, 0)[1]
    area = h * w / 500**2
    assert 0.078 < area.min() < 0.09 and area.max() <= 1
    assert area.mean() == pytest.approx(expected_area(), abs=0.01)
    assert 0.74 < (w / h).min() < 0.77 and 1.30 < (w / h).max() < 1.35
    assert abs(flips.mean() - 0.5) < 0.015
    inner = (left[w < 500] / (500 - w[w < 500])).mean(), (top[h < 500] / (500 - h[h < 500])).mean()
    assert inner == pytest.approx((0.5, 0.5), abs=0.02)


def test_crops_depend_on_seed_phase_and_position_alone():
    size = np.full(60, 200)
    whole, mirrored = random_crops(size, size, 1, 0, 100)
    for start in (100, 101, 130, 159):
        boxes, flips = random_crops(size[: 160 - start], size[: 160 - start], 1, 0, start)
        assert np.array_equal(boxes, whole[start - 100 :]) and np.array_equal(flips, mirrored[start - 100 :])
    for other in ((2, 0, 100), (1, 1, 100), (1, 0, 160)):
        assert (random_crops(size, size, *other)[0] != whole).any(1).mean() > 0.9


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_every_batch(world):
    order = Order(50, 3, 1)
    for t in range(40):
        whole = order.take(12 * t, 12 * (t + 1)).tolist()
        parts = [order.take(*share(t, 12, rank, world)).tolist() for rank in range(world)]
        assert {len(part) for part in parts} == {12 // world} and [i for part in parts for i in part] == whole


def test_the_square_in_the_middle():
    boxes = middle_squares(np.array([10, 7, 9]), np.array([6, 12, 9]))
    assert boxes.tolist() == [[2, 0, 6, 6], [0, 2, 7, 7], [0, 0, 9, 9]]
