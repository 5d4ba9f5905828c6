"""Properties in the VNN-LIB format (version 1) of the verification competition: https://www.vnnlib.org.

A file asserts what a counterexample is: inputs X_i in a box, and outputs Y_j that fulfil linear constraints. `and` and `or`
may be nested in any way. What is no such property is refused.
"""

from __future__ import annotations

import gzip
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import explained

MOST = 10_000  # cases that `or` may lead to
TOKENS = re.compile(r"[()]|[^\s()]+")
Line = tuple[dict[str, float], float]  # ({variable: factor}, constant): the sum of all is at most 0


@dataclass(frozen=True)
class Case:
    """An input between low and high (float64, n) is a counterexample if weight @ outputs + bias is at most 0 in each row of
    at least one of `groups`, pairs of (weight, k x outputs; bias, k)."""

    low: Tensor
    high: Tensor
    groups: tuple[tuple[Tensor, Tensor], ...]

    def values(self, outputs: Tensor) -> Tensor:
        """1 x outputs -> 1 x groups: at most 0 for a counterexample. With it at the end a network is asked whether all its
        outputs are positive."""
        value = None
        for k in range(max(len(bias) for _, bias in self.groups)):  # the k-th row of each group; a short one's last again
            weight = torch.stack([weight[min(k, len(weight) - 1)] for weight, _ in self.groups]).to(outputs.dtype)
            bias = torch.stack([bias[min(k, len(bias) - 1)] for _, bias in self.groups]).to(outputs.dtype)
            rows = F.linear(outputs, weight, bias)
            value = rows if value is None else torch.maximum(value, rows)
        return value


def read(path: Path) -> list[Case]:
    """The cases of a property, one for each box. Raises FastrobustError."""
    with explained(f"{path} cannot be read"):
        content = path.read_bytes()
    try:
        return parse((gzip.decompress(content) if path.suffix == ".gz" else content).decode())
    except (FastrobustError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise FastrobustError(f"{path} is not a VNN-LIB file that can be used: {error}") from None


def parse(text: str) -> list[Case]:
    declared: list[str] = []
    asserted: list[list[list[Line]]] = []
    for term in nested(re.sub(";.*", "", text)):
        if term[:1] == ["declare-const"] and len(term) == 3 and re.fullmatch(r"[XY]_\d+", str(term[1])):
            declared.append(term[1])
        elif term[:1] == ["assert"] and len(term) == 2:
            asserted.append(_alternatives(term[1]))
        else:
            raise FastrobustError(f"{_said(term)} is not understood; it takes (declare-const X_0 Real) and (assert ...)")
    counts = [sum(name[0] == kind for name in declared) for kind in "XY"]
    expected = [f"{kind}_{i}" for kind, count in zip("XY", counts, strict=True) for i in range(count)]
    if not all(counts) or sorted(declared) != sorted(expected):
        raise FastrobustError("it must declare X_0, X_1, ... and Y_0, Y_1, ..., each once and without a gap")
    boxes: dict[bytes, tuple] = {}
    alone = [line for alternatives in asserted if len(alternatives) == 1 for line in alternatives[0]]
    for chosen in itertools.product(*(alternatives for alternatives in asserted if len(alternatives) != 1)):
        low, high, group = _case([*alone, *itertools.chain(*chosen)], *counts)
        boxes.setdefault(low.tobytes() + high.tobytes(), (low, high, []))[2].append(group)
        if sum(len(groups) for *_, groups in boxes.values()) > MOST:
            raise FastrobustError(f"its 'or' lead to more than {MOST:,} cases")
    whole = [(low, high, groups) for low, high, groups in boxes.values() if (low <= high).all()]
    return [Case(torch.from_numpy(low), torch.from_numpy(high), tuple(groups)) for low, high, groups in whole]


def nested(text: str) -> list:
    """What its brackets hold, as lists in lists."""
    stack: list[list] = [[]]
    for token in TOKENS.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise FastrobustError("it has a ')' too many")
            term = stack.pop()
            stack[-1].append(term)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise FastrobustError("it ends before all '(' are closed; is the file whole?")
    return stack[0]


def _said(term) -> str:
    text = f"({' '.join(map(_said, term))})" if isinstance(term, list) else str(term)
    return text if len(text) < 60 else f"{text[:55]} ..."


def _alternatives(term) -> list[list[Line]]:
    """A formula as an `or` of `and`s."""
    match term:
        case ["or", *parts]:
            return [lines for part in parts for lines in _alternatives(part)]
        case ["and", *parts]:
            chosen = itertools.islice(itertools.product(*map(_alternatives, parts)), MOST + 1)
            return [list(itertools.chain(*lines)) for lines in chosen]
        case ["<=", left, right]:
            return [[_line(left, right)]]
        case [">=", left, right]:
            return [[_line(right, left)]]
        case ["=", left, right]:
            return [[_line(left, right), _line(right, left)]]
    raise FastrobustError(f"{_said(term)} is not understood; it takes and, or, <=, >= and = of linear terms")


def _line(left, right) -> Line:
    (factors, constant), (others, other) = _sum(left), _sum(right)
    return {v: factors.get(v, 0) - others.get(v, 0) for v in {**factors, **others}}, constant - other


def _sum(term) -> Line:
    match term:
        case ["+", *parts]:
            sums = [_sum(part) for part in parts]
        case ["-", first, *parts]:
            sums = [_sum(first), *(_times(-1, _sum(part)) for part in parts)] if parts else [_times(-1, _sum(first))]
        case ["*", left, right] if not (a := _sum(left))[0] or not _sum(right)[0]:
            return _times(a[1], _sum(right)) if not a[0] else _times(_sum(right)[1], a)
        case str() if re.fullmatch(r"[XY]_\d+", term):
            return {term: 1.0}, 0.0
        case str() if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", term):
            return {}, float(term)
        case _:
            raise FastrobustError(f"{_said(term)} is not understood; it takes linear terms of X_i, Y_j and numbers")
    factors: dict[str, float] = {}
    for part, _ in sums:
        for variable, factor in part.items():
            factors[variable] = factors.get(variable, 0) + factor
    return factors, sum(constant for _, constant in sums)


def _times(factor: float, line: Line) -> Line:
    return {v: factor * f for v, f in line[0].items()}, factor * line[1]


def _case(lines: list[Line], inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, tuple[Tensor, Tensor]]:
    """(low, high, group) of constraints that hold at once."""
    low, high = np.full(inputs, -np.inf), np.full(inputs, np.inf)
    weights, biases = [], []
    for factors, constant in lines:
        places = [(v[0], int(v[2:]), f) for v, f in factors.items() if f]
        if any(i >= (inputs if kind == "X" else outputs) for kind, i, _ in places):
            raise FastrobustError(f"it uses a variable that it does not declare, among {', '.join(factors)}")
        if all(kind == "Y" for kind, *_ in places):
            weight = np.zeros(outputs)
            for _, i, factor in places:
                weight[i] = factor
            weights.append(weight)
            biases.append(constant)
        elif len(places) == 1:
            _, i, factor = places[0]
            end = -constant / factor
            low[i], high[i] = (low[i], min(high[i], end)) if factor > 0 else (max(low[i], end), high[i])
        else:
            raise FastrobustError(
                f"a constraint ties {', '.join(factors)} together; inputs may only have bounds of their own"
            )
    if not (np.isfinite(low) & np.isfinite(high)).all():
        odd = int(np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))[0])
        raise FastrobustError(f"X_{odd} has no lower or no upper bound")
    if not weights:
        raise FastrobustError("it says nothing about the outputs")
    return low, high, (torch.from_numpy(np.stack(weights)), torch.tensor(biases, dtype=torch.float64))
