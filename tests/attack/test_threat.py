"""Tests of fastrobust.attack.threat against a plain Python version of each formula, one pixel at a time."""

import math

import pytest
import torch

from fastrobust.attack import threat
from fastrobust.attack.threat import Threat


def project_pixel(delta: float, x: float, epsilon: float) -> float:
    """The point of [max(-epsilon, -x), min(epsilon, 1 - x)] nearest to delta."""
    low, high = max(-epsilon, -x), min(epsilon, 1 - x)
    return low if delta < low else high if delta > high else delta


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random pixels, a third of them saturated at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    kind = torch.randint(6, shape, generator=generator)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, x))


@pytest.mark.parametrize("epsilon", [0.0, 8 / 255, 0.3, 1.0])
def test_project_is_the_nearest_point_pixel_by_pixel(epsilon):
    x = images(3, 2, 5, 4)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(delta.flatten().tolist(), x.flatten().tolist(), strict=True)
    expected = [project_pixel(d, p, epsilon) for d, p in pairs]
    found = threat.project(delta, x, epsilon)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=0, atol=1e-7)
    assert found.abs().max() <= epsilon
    assert (x + found).min() >= 0 and (x + found).max() <= 1


def test_project_at_saturated_pixels():
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.95])
    delta = torch.tensor([-0.5, 0.5, -0.5, 0.5, 0.5])
    torch.testing.assert_close(threat.project(delta, x, 0.1), torch.tensor([0.0, 0.1, -0.1, 0.0, 0.05]))


def test_project_twice_is_project_once():
    x = images(4, 3, 6, 6)
    once = threat.project(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), x, 0.1)
    assert torch.equal(threat.project(once, x, 0.1), once)


def test_project_leaves_inner_points_and_its_arguments_alone():
    x = torch.full((2, 1, 3, 3), 0.5)
    delta = torch.linspace(-0.09, 0.09, 18).view_as(x)
    before = delta.clone()
    assert torch.equal(threat.project(delta, x, 0.1), before)
    threat.project(delta, x, 0.01)
    assert torch.equal(delta, before) and x.eq(0.5).all()


def test_clip_to_box_knows_no_ball():
    x = images(2, 3, 5, 5)
    delta = 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    pairs = zip(delta.flatten().tolist(), x.flatten().tolist(), strict=True)
    expected = [min(max(p + d, 0.0), 1.0) - p for d, p in pairs]
    torch.testing.assert_close(threat.clip_to_box(delta, x).flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_box_holds_what_project_can_reach():
    x = images(2, 3, 5, 5)
    lower, upper = threat.box(x, 0.1)
    for pixel, low, high in zip(x.flatten().tolist(), lower.flatten().tolist(), upper.flatten().tolist(), strict=True):
        assert (low, high) == pytest.approx((max(pixel - 0.1, 0.0), min(pixel + 0.1, 1.0)), abs=1e-6)
    torch.testing.assert_close(x + threat.project(torch.ones_like(x), x, 0.1), upper)
    torch.testing.assert_close(x + threat.project(-torch.ones_like(x), x, 0.1), lower)


def test_uniform_start_stays_in_ball_and_box():
    torch.manual_seed(0)
    x = images(8, 3, 16, 16)
    delta = threat.uniform_start(x, 0.3)
    assert delta.shape == x.shape and delta.dtype == x.dtype
    assert delta.abs().max() <= 0.3
    assert (x + delta).min() >= 0 and (x + delta).max() <= 1
    assert delta[x == 0].min() == 0 and delta[x == 0].max() > 0.25  # half of them cut, the rest as drawn
    assert delta[x == 1].max() == 0 and delta[x == 1].min() < -0.25


def test_uniform_start_is_uniform():
    torch.manual_seed(1)
    n, radius = 100_000, 0.1
    delta = threat.uniform_start(torch.full((n, 1, 1, 1), 0.5), radius).flatten().double()
    ordered = delta.sort().values
    uniform = -radius + 2 * radius * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (ordered - uniform).abs().max() / (2 * radius) < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %
    assert abs(delta.mean()) < 4 * radius / math.sqrt(3 * n)
    assert delta.min() < -0.999 * radius and delta.max() > 0.999 * radius


def test_uniform_start_draws_every_pixel_anew():
    torch.manual_seed(2)
    x = torch.full((20, 3, 8, 8), 0.5)
    delta = threat.uniform_start(x, 0.1)
    assert delta.unique().numel() > 0.99 * delta.numel()
    assert not torch.equal(delta, threat.uniform_start(x, 0.1))


def test_radii_may_be_tensors():
    """As a schedule gives them: with one element, zero included."""
    x = images(3, 2, 5, 4)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    for radius in (0.0, 0.125):
        tensor = torch.tensor(radius)
        assert torch.equal(threat.project(delta, x, tensor), threat.project(delta, x, radius))
        assert torch.equal(threat.signed_step(delta, x - 0.5, tensor), threat.signed_step(delta, x - 0.5, radius))
        torch.manual_seed(6)
        start = threat.uniform_start(x, tensor)
        torch.manual_seed(6)
        assert torch.equal(start, threat.uniform_start(x, radius))
        assert start.abs().max() <= radius
    assert not start.requires_grad and start.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signed_step_moves_by_alpha_or_not_at_all(dtype):
    """Zero, minus zero and not-a-number stay; the smallest and the infinite gradient make a whole step."""
    tiny = torch.finfo(dtype).tiny
    values = [0.0, -0.0, math.nan, tiny, -tiny, 1.0, -1.0, math.inf, -math.inf] * 9  # long enough for vector code
    moves = [0, 0, 0, 1, -1, 1, -1, 1, -1] * 9
    gradient = torch.tensor(values, dtype=dtype)
    delta = torch.linspace(-1, 1, len(values))
    expected = [d + 0.25 * m for d, m in zip(delta.tolist(), moves, strict=True)]
    torch.testing.assert_close(threat.signed_step(delta, gradient, 0.25), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_is_kept_and_changes_nothing(layout):
    x = images(4, 3, 7, 5)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    plain = threat.project(threat.signed_step(delta, -delta, 0.05), x, 0.1)
    x, delta = x.to(memory_format=layout), delta.to(memory_format=layout)
    moved = threat.project(threat.signed_step(delta, -delta, 0.05), x, 0.1)
    assert torch.equal(moved, plain)
    assert moved.is_contiguous(memory_format=layout)
    assert threat.uniform_start(x, 0.1).is_contiguous(memory_format=layout)


# ---- the class that all other code uses


def test_a_threat_is_its_radius_and_the_functions():
    x, generator = images(3, 2, 5, 4), torch.Generator().manual_seed(7)
    delta, gradient = (torch.randn(x.shape, generator=generator) for _ in range(2))
    ball = Threat(0.1)
    assert torch.equal(ball.project(delta, x), threat.project(delta, x, 0.1))
    assert torch.equal(ball.clip(delta, x), threat.clip_to_box(delta, x))
    assert torch.equal(ball.step(delta, gradient, 0.03), threat.signed_step(delta, gradient, 0.03))
    assert all(torch.equal(a, b) for a, b in zip(ball.box(x), threat.box(x, 0.1), strict=True))
    for clip in (True, False):
        torch.manual_seed(8)
        start = ball.start(x, clip)
        torch.manual_seed(8)
        assert torch.equal(start, threat.uniform_start(x, 0.1, clip))
        assert ((x + start).clamp(0, 1) == x + start).all() == clip
    assert ball.scaled(0.5) == Threat(0.05) and ball == Threat(0.1)
    assert ball.scaled(torch.tensor(0.5)).radius == torch.tensor(0.05)


def test_noise_depends_on_the_generator_alone():
    ball = Threat(0.25)
    one, same, other = (ball.noise((40, 3, 8, 8), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.abs().max() <= 0.25 and one.min() < -0.249 and one.max() > 0.249 and one.mean().abs() < 0.01


def test_the_nearest_allowed_point_pixel_by_pixel():
    x, points = images(3, 2, 5, 4), 2 * torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(9))
    found = Threat(0.1).nearest(points, x)
    for p, pixel, q in zip(points.flatten().tolist(), x.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert q == pytest.approx(pixel + project_pixel(p - pixel, pixel, 0.1), abs=1e-6)
    assert Threat(0.1).contains(found, x, 1e-6).all()


def test_one_pixel_outside_is_outside():
    """In every pixel of every image, at the ball and at the box, by more and by less than the tolerance."""
    ball = Threat(0.1)
    for pixel, allowed in ((0.5, (0.4, 0.6)), (0.05, (0.0, 0.15)), (0.97, (0.87, 1.0))):
        x = torch.full((24, 2, 3, 4), pixel)
        for edge, outwards in zip(allowed, (-1, 1), strict=True):
            points = x.clone()
            places = torch.arange(24)
            points.flatten(1)[places, places] = edge + outwards * 0.002
            assert not ball.contains(points, x, 0.001).any()
            assert ball.contains(points, x, 0.003).all()
            points[1] = x[1]
            assert ball.contains(points, x, 0.001).tolist() == [k == 1 for k in range(24)]
    assert not ball.contains(torch.full((2, 1, 2, 2), math.nan), torch.full((2, 1, 2, 2), 0.5), 1.0).any()
