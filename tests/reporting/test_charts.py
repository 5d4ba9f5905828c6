"""Charts read back: what matplotlib was given against the numbers; and what stands around them."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from fastrobust.reporting import charts
from fastrobust.reporting.charts import Line


def drawn(*lines: Line, **options):
    """(the axes, the text within them) of a chart that was laid out."""
    figure = charts.draw(lines, **{"x": "x"} | options)
    figure.draw_without_rendering()
    texts = [*figure.axes[0].texts, *(text for legend in figure.legends for text in legend.get_texts())]
    return figure.axes[0], [text.get_text().strip() for text in texts]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_holds_its_points_in_order(log):
    axes, _ = drawn(Line("a", [(40.0, 20.0), (1.0, 0.02), (3.0, 0.5)]), log_x=log)
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 0.02], [3.0, 0.5], [40.0, 20.0]]
    assert axes.get_xscale() == ("log" if log else "linear") and axes.get_ylim()[0] == 0


def test_points_that_cannot_be_drawn_are_left_out():
    nan = float("nan")
    axes, texts = drawn(Line("a", [(1, nan), (2, 1.0), (3, 2.0), (nan, 1), (float("inf"), 1)]))
    assert axes.lines[0].get_xydata().tolist() == [[2, 1], [3, 2]] and texts == []
    assert drawn(Line("a", [(1, nan)]))[1] == ["nothing was recorded"]


@pytest.mark.parametrize("points", [[], [(1, 1)], [(1, 0), (2, 0)], [(0, 5), (0, 5)], [(1e-9, 1e9), (2e-9, 1e9)]])
def test_few_or_equal_points_make_a_chart(points):
    _, texts = drawn(Line("a", points))
    assert ("nothing was recorded" in texts) == (not points)


def test_epochs_are_whole_numbers():
    axes, _ = drawn(Line("a", [(1, 0.5), (2, 0.6), (3, 0.7)]), x="epoch")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_shares_are_in_per_cent_of_all():
    axes, _ = drawn(Line("a", [(1, 0.4), (2, 0.6)]), percent=True)
    low, high = axes.get_ylim()
    assert low < 0 and high > 1  # what is drawn at 0 or 1 is whole
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert "0%" in shown and "100%" in shown


def test_a_band_lies_between_the_seeds():
    line = Line.over_seeds("a", [(1, [0.2, 0.4]), (2, [0.5]), (3, [0.1, 0.3, 0.8])], 4)
    assert line.points == [(1, pytest.approx(0.3)), (2, 0.5), (3, pytest.approx(0.4))]
    assert line.band == [(1, 0.2, 0.4), (3, 0.1, 0.8)]
    axes, _ = drawn(line)
    (band,) = axes.collections
    assert {tuple(at) for at in band.get_paths()[0].vertices.tolist()} == {(1, 0.2), (1, 0.4), (3, 0.1), (3, 0.8)}


def test_words_are_not_formulas_and_each_line_has_its_own():
    """matplotlib leaves out labels that begin with `_`, and sets what is between dollars as a formula."""
    lines = [Line("$x$ _y_", [(0, 1)]), Line("_hidden", [(0, 2)], 1), *(Line(f"run {k}", [(0, k)], k) for k in range(2, 20))]
    axes, texts = drawn(*lines)
    assert texts == [r"\$x\$ _y_", "_hidden", *(f"run {k}" for k in range(2, 20))]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 20


def test_the_same_lines_give_the_same_bytes():
    lines = [Line("a", [(0, 1), (1, 2)]), Line("b", [(0, 2), (1, 1)], 1)]
    assert charts.chart("t", lines, x="x") == charts.chart("t", lines, x="x")


def test_text_is_escaped():
    evil = '<script>alert("1")</script>&'
    lines = [Line(evil, [(0, 1)]), Line("b", [])]
    whole = charts.page(evil, charts.chart(evil, lines, x=evil, marks=[(0, evil)]))
    assert "<script" not in whole and whole.count("&lt;script&gt;") == 3
    image = base64.b64decode(re.search(r"svg\+xml;base64,([^\"]+)", whole).group(1)).decode()
    assert "<svg" in image and "<script" not in image


def test_a_picture_is_the_pixels():
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
        data = re.search(r"base64,([^\"]+)", charts.picture(pixels, "p")).group(1)
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert (found.reshape(pixels.shape) == pixels).all()


def test_marks_and_levels_lie_at_their_values():
    marks = [(0.1, "early"), (0.9, "late")]
    axes, texts = drawn(Line("a", [(0, 0.0), (1, 1.0)]), percent=True, levels=[(0.6, "goal")], marks=marks)
    _, level, early, late = axes.lines
    assert list(level.get_ydata()) == [0.6, 0.6] and texts == ["goal", "early", "late"]
    assert list(early.get_xdata()) == [0.1, 0.1] and list(late.get_xdata()) == [0.9, 0.9]
    box = axes.get_window_extent()
    assert all(box.x0 <= text.get_window_extent().x0 and text.get_window_extent().x1 <= box.x1 + 1 for text in axes.texts)


def test_only_ranges_are_set_small():
    assert charts.ranged("50.10 (49.00 to 51.00)") == "50.10 <small>(49.00 to 51.00)</small>"
    assert charts.ranged("Free (m = 4) <b>") == "Free (m = 4) &lt;b&gt;"
