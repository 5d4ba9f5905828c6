"""Is there a counterexample to a property (VNN-LIB) of a network (ONNX)? The answers of the verification competition: `sat`
with a counterexample, `unsat`, `timeout`, and `unknown` where more time would not help."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrobust.runtime.errors import FastrobustError
from fastrobust.verification import branch, search, vnnlib
from fastrobust.verification.lowering import check, lower
from fastrobust.verification.network import DTYPE
from fastrobust.verification.onnx_file import OnnxNetwork
from fastrobust.verification.reduced import TooLarge

STEPS, RESTARTS = 100, 5  # of the attack


@dataclass(frozen=True)
class Answer:
    """answer: sat, unsat, timeout or unknown. by: what decided it. inputs, outputs: of the counterexample, flat; float64
    inside the box, and what the network gives for them in single precision."""

    answer: str
    by: str
    domains: int = 0
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def text(self) -> str:
        """As in a result file of the competition."""
        if self.inputs is None:
            return f"{self.answer}\n"
        named = [
            f"({kind}_{i} {v!r})" for kind, t in (("X", self.inputs), ("Y", self.outputs)) for i, v in enumerate(t.tolist())
        ]
        return f"{self.answer}\n({chr(10).join(named)}\n)\n"


def verify(network: Path, property_: Path, timeout: float, device: torch.device = search.CPU) -> Answer:
    """timeout: seconds for all of it. device: of branch and bound. Raises FastrobustError."""
    deadline = time.monotonic() + timeout
    onnx, cases = OnnxNetwork(network), vnnlib.read(property_)
    found = [Answer("unsat", "no input is in the box")]
    for case in cases:
        found.append(_decide(onnx, case, deadline, device))
        if found[-1].answer == "sat":
            return found[-1]
    return next((answer for answer in found if answer.answer != "unsat"), found[-1])


def _decide(onnx: OnnxNetwork, case: vnnlib.Case, deadline: float, device: torch.device) -> Answer:
    size = len(case.low)
    if size != torch.Size(onnx.shape).numel():
        raise FastrobustError(f"the property has {size} inputs, {onnx.path} takes {' x '.join(map(str, onnx.shape))}")
    outputs = lambda x: onnx(x.reshape(onnx.shape)).reshape(1, -1)
    values = lambda x: case.values(outputs(x))
    many = torch.vmap(lambda x: values(x)[0])
    try:
        _compare(onnx, outputs, case)
        network = lower(values, (1, size))
        points = case.low + (case.high - case.low) * torch.rand(4, size, generator=_random(), dtype=DTYPE)
        check(network, points, torch.cat([values(x) for x in points.split(1)]))
    except RuntimeError as error:
        raise FastrobustError(f"{onnx.path} and the property do not fit together: {error}") from None
    low, high = _single(case.low, torch.inf), _single(case.high, -torch.inf)
    low, high = torch.where(low > high, case.low.float(), low), torch.where(low > high, case.low.float(), high)

    def exactly(points: Tensor) -> Tensor:
        """The numbers in the box that single precision rounds to these points."""
        return torch.minimum(torch.maximum(points.to(DTYPE), case.low), case.high)

    def confirmed(points: Tensor) -> Tensor:
        """By a pass in single precision, one in double precision, and one of onnxruntime."""
        with torch.no_grad():
            broken = (many(points) <= 0).any(1) & (network(exactly(points)) <= 0).any(1)
        for i in broken.nonzero()[:, 0].tolist():
            said = onnx.reference(points[i].reshape(onnx.shape)).reshape(1, -1)
            broken[i] = (case.values(said.to(DTYPE)) <= 0).any()
        return broken

    attack = lambda groups: _attack(many, low, high, groups, confirmed, deadline)
    rounded = lambda x: torch.minimum(torch.maximum(x.float(), low), high)
    everything = torch.arange(len(case.groups))
    try:
        least, *_ = search.margins(network, (case.low, case.high), network.outputs, 0, deadline)
        if (least > branch.TOLERANCE).all():
            return Answer("unsat", "bounds")
        if len(points := attack(everything)):
            found = search.Found(search.FAILS, "attack", witness=points[0])
        else:
            bounded = search.margins(network, (case.low, case.high), network.outputs, 20, deadline)
            found = search.decide(*bounded, deadline, attack, rounded, confirmed, device=device)
    except TooLarge:
        found = search.Found(search.OPEN, "too many open ReLUs")
    if found.answer == search.FAILS:
        with torch.no_grad():
            return Answer("sat", found.by, found.domains, exactly(found.witness), outputs(found.witness[None])[0])
    if found.answer == search.HOLDS:
        return Answer("unsat", found.by, found.domains)
    return Answer("timeout" if time.monotonic() > deadline else "unknown", found.by, found.domains)


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _compare(onnx: OnnxNetwork, outputs: Callable[[Tensor], Tensor], case: vnnlib.Case) -> None:
    """Raise FastrobustError unless the file is run here as onnxruntime runs it, and has the property's outputs."""
    x = (case.low + (case.high - case.low) * torch.rand(len(case.low), generator=_random(), dtype=DTYPE)).float()
    with torch.no_grad():
        mine, said = outputs(x[None])[0], onnx.reference(x.reshape(onnx.shape)).flatten()
    count = case.groups[0][0].shape[1]
    if len(mine) != count:
        raise FastrobustError(f"the property has {count} outputs, {onnx.path} gives {len(mine)}")
    if not torch.allclose(mine, said, rtol=1e-3, atol=1e-3 * max(1.0, said.abs().max().item())):
        error = (mine - said).abs().max().item()
        raise FastrobustError(
            f"{onnx.path}: its outputs are not what onnxruntime computes (by {error:.2g}); please report it"
        )


def _single(t: Tensor, towards: float) -> Tensor:
    """The next number in single precision that is not beyond t, seen from `towards`."""
    near = t.float()
    beyond = near.to(DTYPE) < t if towards > 0 else near.to(DTYPE) > t
    return torch.where(beyond, near.nextafter(torch.full_like(near, towards)), near)


def _attack(
    many: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    groups: Tensor,
    confirmed: Callable[[Tensor], Tensor],
    deadline: float,
) -> Tensor:
    """Counterexamples (float32 N x n), or none: PGD on each of the groups, until some are found."""
    chosen = groups.repeat_interleave(RESTARTS)[:, None]
    x = low + (high - low) * torch.rand(len(chosen), len(low), generator=_random())
    for step in range(STEPS):
        x.requires_grad_()
        values = many(x)
        found = x.detach()[(values <= 0).any(1)]
        if len(found) and len(found := found[confirmed(found)]):
            return found
        if time.monotonic() > deadline:
            break
        (slope,) = torch.autograd.grad(values.gather(1, chosen).sum(), x)
        rate = 0.25 * 0.96**step  # of the box's width
        x = torch.minimum(torch.maximum(x.detach() - rate * (high - low) * slope.sign(), low), high)
    return x[:0].detach()
