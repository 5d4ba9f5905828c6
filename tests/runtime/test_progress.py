"""What the terminal shows while work goes on, in 80 columns, with a terminal and without one."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from fastrobust.runtime import progress
from fastrobust.runtime.progress import Overall, Progress


@pytest.fixture
def clock(monkeypatch):
    """A list whose one number is the time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_estimate_of_all_parts_counts_what_is_left_and_not_what_was_done_before(clock):
    overall = Overall([100, 100, 300])
    assert overall.told(0) == "1 of 3; all: 0.0 s so far, about ? left"
    overall.next(skipped=True)
    assert overall.told(0) == "2 of 3; all: 0.0 s so far, about ? left"
    clock[0] = 20
    assert overall.share(0.5) == 0.3
    assert overall.told(0.5) == "2 of 3; all: 20.0 s so far, about 2:20 left"  # 50 in 20 s, 350 are left
    overall.next()
    clock[0] = 40
    assert overall.told(1.0) == "3 of 3; all: 40.0 s so far, about 0.0 s left"


def test_without_a_terminal_lines_come_after_5_seconds_and_every_30(clock, capsys):
    overall = Overall([10, 10])
    with Progress("PGD-50-10 at 8/255", 10**5, overall=overall) as bar:
        for second in range(1, 80):
            clock[0] = second
            bar.advance(1000, "restart 10/10, 10000 robust" if bar.due() else None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 80
    assert lines[0].startswith("PGD-50-10 at 8/255 6000/100000 ") and lines[1].startswith("  1 of 2; all: 6.0 s so far")
    with Progress("alone", 10, overall=Overall([1])) as bar:
        bar.advance(1, "x")
    assert capsys.readouterr().out.count("\n") == 1, "one part needs no estimate of all"


def test_a_bar_and_the_estimate_fit_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **options: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with Progress("PGD-50-10 at 8/255", 10**5, overall=Overall([10] * 12)) as bar:
        bar.advance(12345, "restart 10/10, 10000 robust")
        bar.bar.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    assert (
        "12345/100000" in shown and "restart 10/10, 10000 robust" in shown and "1 of 12; all:" in shown and "…" not in shown
    )


def test_a_long_first_piece_is_no_part_of_the_pace(clock, capsys):
    """A first step on a GPU captures a graph. A line comes 5 s after the start, but not for that step alone."""
    with Progress("train", 100) as bar:
        for clock[0] in (8.0, 9.0, 10.0):
            bar.advance(1, "loss 1" if bar.due() else None)
    assert capsys.readouterr().out == "train 2/100  loss 1  1:38 left\n"
    with Progress("train", 3) as bar:
        clock[0] += 45
        bar.advance(1, "loss 1" if bar.due() else None)
    assert capsys.readouterr().out == "train 1/3  loss 1  1:30 left\n"
