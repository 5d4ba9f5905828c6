"""The search by squares against every corner of a small box, and its place beside branch and bound."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from small_networks import SHAPE, decide, images, tiny

from fastrobust.verification import branch, squares
from fastrobust.verification.decide import Decider
from fastrobust.verification.squares import Squares

SMALL = (1, 3, 4)  # 4,096 corners


def thresholds(seed: int):
    """A network whose slope is 0 nearly everywhere: signs of sums of pixels, weighed. (the margin to a class, low, high)"""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(12, 20, generator=generator)
    second = torch.randn(20, 3, generator=generator)
    low = torch.rand(SMALL, generator=generator) * 0.5

    def margin(points, classes):
        logits = ((points.flatten(1) - 0.5) @ first).sign() @ second
        return 40 + logits[:, 0] - logits.gather(1, classes[:, None])[:, 0]

    return margin, low, low + 0.5


@pytest.mark.parametrize("seed", range(4))
def test_the_least_margins_are_those_of_all_corners(seed):
    margin, low, high = thresholds(seed)
    up = torch.tensor(list(itertools.product((False, True), repeat=12))).reshape(-1, *SMALL)
    every = torch.where(up, high, low)
    classes = torch.tensor([1, 2])
    search = Squares(margin, low, high, classes)
    for _ in range(60):
        assert search.follow([0, 1]) is None
    for i, goal in enumerate(classes):
        least = margin(every, goal.expand(len(every))).min()
        assert search.least[i] == pytest.approx(least.item(), abs=1e-5)
        assert margin(search.best[i : i + 1], goal[None]).item() == search.least[i]
        assert ((search.best[i] == low) | (search.best[i] == high)).all()


def test_a_point_is_given_as_soon_as_a_margin_is_negative():
    margin, low, high = thresholds(0)
    classes = torch.tensor([1, 2])
    shifted = lambda points, goals: margin(points, goals) - 40
    point = next(p for p in (Squares(shifted, low, high, classes).follow([0, 1]) for _ in range(60)) if p is not None)
    assert point.shape == SMALL and ((point == low) | (point == high)).all()
    assert min(shifted(point[None], goal[None]).item() for goal in classes) < squares.ENOUGH


def test_classes_that_are_proved_are_not_followed():
    margin, low, high = thresholds(1)
    asked = []
    noted = lambda points, goals: asked.append(set(goals.tolist())) or margin(points, goals)
    search = Squares(noted, low, high, torch.tensor([1, 2]))
    while not torch.isfinite(search.least).all():
        search.follow([0, 1])
    asked.clear()
    for _ in range(2 * squares.ROUNDS // squares.SLICE):
        search.follow([1])
    assert asked[squares.ROUNDS :] and all(goals == {2} for goals in asked[squares.ROUNDS :])


def test_an_image_that_only_squares_break_is_falsified(monkeypatch):
    """Where plain attacks and branch and bound find nothing, the search beside it does; its point is checked as any."""
    decider = Decider(tiny(0, scale=3.0), SHAPE, 0.2)
    monkeypatch.setattr(Decider, "attack", lambda self, x, *_, **__: (torch.zeros(len(x), dtype=torch.bool), x))

    def nothing_but_squares(bounder, rows, until, broken, beside):
        found = any(beside(list(range(len(rows)))) for _ in range(50))
        return list(range(len(rows))), None, int(found)

    monkeypatch.setattr(branch, "decide", nothing_but_squares)
    monkeypatch.setattr(branch, "program", lambda *_: ("timeout", None))
    found = []
    for k in range(12):
        image = images(1, 100 + k)
        label = decider.model(image.float() / 255).argmax(1)
        found += decide(decider, [k], image, label, 20)
        if (point := found[-1].witness) is not None:
            assert found[-1].by == "search by squares" and found[-1].verdict == "falsified"
            assert ((point - image[0].float() / 255).abs() <= 0.2).all() and decider.model(point[None]).argmax() != label
    assert {v.verdict for v in found} >= {"falsified"}


def test_branch_and_bound_stops_where_the_search_beside_it_has_an_answer():
    decider = Decider(tiny(1, scale=3.0, deep=False), SHAPE, 0.2)
    x = images(1, 101)[0].float() / 255
    _, bounder, questions = decider.margins(x, decider.model(x[None]).argmax(), 5)
    rows = questions[(bounder.tighten(bounder.root(questions), 20).bound <= branch.TOLERANCE)]
    nothing = lambda points: torch.zeros(len(points), dtype=torch.bool)
    calls = []
    answer = lambda targets: calls.append(targets) or True
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(branch, "ASIDE", 1e9)
        left, corner, _ = branch.decide(bounder, rows, time.monotonic() + 30, nothing, answer)
    assert len(rows) and corner is None and [left] == calls
