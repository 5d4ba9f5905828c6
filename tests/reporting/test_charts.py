"""Charts read back: what stands in the SVG against the numbers that were given."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from fastrobust.reporting import charts
from fastrobust.reporting.charts import Line


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def axis(svg: str, anchor: str) -> list[tuple[float, float]]:
    """(place, value) of the tick labels of the y axis (anchor end) or the x axis (middle)."""
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(-?[\d.e+-]+k?)%?</text>', svg)
    return [(float(y) - 4 if anchor == "end" else float(x), float(text)) for x, y, a, text in found if a == anchor]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_lies_where_the_ticks_say(log):
    """Through two ticks of each axis goes the map from places to values; it must give the data back."""
    data = [(1.0, 0.02), (3.0, 0.5), (10.0, 7.0), (40.0, 20.0)]
    svg = charts.chart("t", [Line("a", data)], x="x", log_x=log, log_y=log)
    forward = math.log if log else float
    for which, anchor in ((0, "middle"), (1, "end")):
        ticks = axis(svg, anchor)
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        slope = (forward(v1) - forward(v0)) / (p1 - p0)
        for place, value in zip(points_of(svg)[0], data, strict=True):
            found = forward(v0) + slope * (place[which] - p0)
            assert found == pytest.approx(forward(value[which]), abs=0.01 * abs(slope) * 350)


def test_points_that_cannot_be_drawn_are_left_out():
    nan = float("nan")
    lines = [Line("a", [(1, nan), (2, 1.0), (3, 2.0), (nan, 1), (float("inf"), 1)]), Line("b", [(0, 1), (-1, 2), (5, 0)])]
    svg = charts.chart("t", lines, x="x", log_x=True, log_y=True)
    assert [len(points) for points in points_of(svg)] == [2, 0]
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("points", [[], [(1, 1)], [(1, 0), (2, 0)], [(0, 5), (0, 5)], [(1e-9, 1e9), (2e-9, 1e9)]])
def test_few_or_equal_points_make_a_chart(points):
    svg = charts.chart("t", [Line("a", points)], x="x")
    assert ("nothing was recorded" in svg) == (not points)
    assert all(0 <= px <= charts.WIDTH and 0 <= py <= charts.HEIGHT for line in points_of(svg) for px, py in line)


@pytest.mark.parametrize(
    "low, high, log, expected",
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.1, 0.26, False, [0.1, 0.15, 0.2, 0.25]),
        (-3, 9, False, [-2.5, 0, 2.5, 5, 7.5]),
        (1, 100, True, [1, 2, 5, 10, 20, 50, 100]),
        (1e-4, 10, True, [1e-4, 1e-3, 1e-2, 0.1, 1, 10]),
    ],
)
def test_ticks_are_round(low, high, log, expected):
    assert charts.ticks(low, high, log) == pytest.approx(expected)


def test_text_is_escaped():
    evil = '<script>alert("1")</script>&'
    whole = charts.page(
        evil, charts.chart(evil, [Line(evil, [(0, 1)]), Line("b", [])], x=evil, marks=[(0, evil)], note=evil)
    )
    assert "<script" not in whole
    assert whole.count("&lt;script&gt;") >= 6


def test_a_picture_is_the_pixels():
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
        data = re.search(r"base64,([^\"]+)", charts.picture(pixels, "p")).group(1)
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert (found.reshape(pixels.shape) == pixels).all()


def test_a_level_lies_where_the_tick_of_its_value_does():
    svg = charts.chart(
        "t", [Line("a", [(0, 0.0), (1, 1.0)])], x="x", percent=True, y_range=(0.0, 1.0), levels=[(0.6, "goal")]
    )
    place = next(place for place, value in axis(svg, "end") if value == 60)
    level = re.search(r'y1="([\d.]+)" y2="\1"[^>]*stroke-dasharray', svg)
    assert float(level.group(1)) == pytest.approx(place, abs=0.2) and ">goal</text>" in svg


def test_only_ranges_are_set_small():
    assert charts.ranged("50.10 (49.00 to 51.00)") == "50.10 <small>(49.00 to 51.00)</small>"
    assert charts.ranged("Free (m = 4) <b>") == "Free (m = 4) &lt;b&gt;"
