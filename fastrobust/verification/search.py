"""Does every one of some rows exceed the tolerance everywhere in a box? Optimised bounds, an attack, branch and bound, and
at the last a mixed-integer program."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrobust.verification import bounds, branch
from fastrobust.verification.bounds import Bounder
from fastrobust.verification.network import Network, Sum

HOLDS, FAILS, OPEN = "holds", "fails", "open"
CPU = torch.device("cpu")
FEW, FIRST = 300, 1 / 3  # with at most FEW open ReLUs branch and bound has the share FIRST of the time, and HiGHS the rest


@dataclass(frozen=True)
class Found:
    """answer: HOLDS, FAILS at the witness (a point that `rounded` gave), or OPEN. by: what decided it. domains: visited."""

    answer: str
    by: str
    domains: int = 0
    witness: Tensor | None = None


def made_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, new tensors are made on the device. (For the CPU nothing is done: this costs time.)"""
    return contextlib.nullcontext() if device == CPU else device


def margins(
    network: Network, box: tuple[Tensor, Tensor], asked: Sum, steps: int, deadline: float = math.inf
) -> tuple[Tensor, Bounder, Tensor]:
    """(lower bounds on every row of `asked` over the box; the bounder around it; the rows as questions about it). Raises
    TooLarge."""
    around = bounds.surround(network, box, steps, deadline)
    questions = torch.from_numpy(around.after(asked).toarray())
    bounder = Bounder(around, deadline)
    return bounder.tighten(bounder.root(questions), steps, enough=2 * branch.TOLERANCE).bound, bounder, questions


def decide(
    least: Tensor,
    bounder: Bounder,
    questions: Tensor,
    deadline: float,
    attack: Callable[[Tensor], Tensor],
    rounded: Callable[[Tensor], Tensor],
    confirmed: Callable[[Tensor], Tensor],
    another: Callable[[Tensor], Tensor] = lambda rows: torch.empty(0),
    device: torch.device = CPU,
) -> Found:
    """From what `margins` gave. attack: tries to break the rows with these numbers, and gives the points with which it did.
    rounded: inputs (float64 N x all) as points that may be shown. confirmed: which points break a row beyond doubt; nothing
    else counts. another: an attack that is called again and again, and goes on where it was. device: where branch and
    bound works; all else is done on the CPU."""
    todo = (least <= branch.TOLERANCE).nonzero()[:, 0]
    if not len(todo):
        return Found(HOLDS, "optimised bounds")
    if time.monotonic() > deadline:
        return Found(OPEN, "optimised bounds")
    if len(points := attack(todo)):
        return Found(FAILS, "attack", witness=points[0])

    points_of = lambda corners: rounded(bounder.reduced.images(corners.cpu()))

    def adversarial(corners: Tensor) -> Tensor:
        with CPU:  # whatever `made_on` says around it
            return confirmed(points_of(corners)).to(corners.device)

    began, few = time.monotonic(), len(bounder.reduced.lower) <= FEW
    until = began + FIRST * (deadline - began) if few else deadline
    witnesses: list[Tensor] = []

    def beside(rows: list[int]) -> bool:
        with CPU:
            witnesses.extend(another(todo[rows]))
        return bool(witnesses)

    with made_on(device):
        there = bounder if device == CPU else Bounder(bounder.reduced.to(device), bounder.deadline)
        left, corner, domains = branch.decide(there, questions[todo].to(device), until, adversarial, beside)
    if witnesses:
        return Found(FAILS, "search by squares", domains, witnesses[0])
    if corner is not None:
        return Found(FAILS, "branch and bound", domains, points_of(corner[None])[0])
    for target in todo[left].tolist():
        if time.monotonic() > deadline:
            return Found(OPEN, "branch and bound", domains)
        kind, corner = branch.program(bounder, questions[target], deadline - time.monotonic())
        if kind == "point" and adversarial(corner[None]).item():  # counts only if a forward pass agrees
            return Found(FAILS, "mixed-integer program", domains, points_of(corner[None])[0])
        if kind != "verified":
            return Found(OPEN, "mixed-integer program", domains)
    return Found(HOLDS, "mixed-integer program" if left else "branch and bound", domains)
