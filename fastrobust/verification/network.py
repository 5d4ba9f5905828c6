"""A network as all bounds see it: values, each a ReLU of matrices times earlier values, and outputs that are a sum of the
same kind. Convolutions, BatchNorm, pooling, padding, residual sums and normalisation are all such matrices (`lowering`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

DTYPE = torch.float64
ROUNDING = 1e-9  # every bound is widened by it: far above what the additions behind a bound lose in double precision
Numbers = TypeVar("Numbers", Tensor, np.ndarray)
LARGE = 1e3  # bounds beyond it are widened in proportion


def slack(bounds: Numbers) -> Numbers:
    """How much each of these bounds is widened."""
    return ROUNDING * (abs(bounds) / LARGE).clip(1)


@dataclass(frozen=True)
class Sum:
    """z = the sum of parts[s] @ (value s) + shift. parts: float64, outputs x size of value s. shift: float64, outputs."""

    parts: dict[int, sparse.csr_array]
    shift: np.ndarray

    @cached_property
    def sizes(self) -> dict[int, sparse.csr_array]:
        return {s: abs(weight) for s, weight in self.parts.items()}

    @property
    def of_inputs(self) -> bool:
        """Whether it is affine in the inputs: then intervals are exact."""
        return set(self.parts) <= {0}

    def __call__(self, values: list[np.ndarray]) -> np.ndarray:
        """values: each N x size. Returns N x outputs."""
        return sum(((weight @ values[s].T).T for s, weight in self.parts.items()), np.zeros((1, 1))) + self.shift

    def interval(self, ends: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """(lower, upper) over a box of each value, widened."""
        centre, radius = self.shift, np.zeros(len(self.shift))
        for s, weight in self.parts.items():
            lower, upper = ends[s]
            centre = weight @ ((upper + lower) / 2) + centre
            radius = radius + self.sizes[s] @ ((upper - lower) / 2)
        lower, upper = centre - radius, centre + radius
        return lower - slack(lower), upper + slack(upper)

    def rows(self, mix: np.ndarray) -> Sum:
        """mix @ z. mix: rows x outputs."""
        mix = sparse.csr_array(mix)
        return Sum({s: (mix @ weight).tocsr() for s, weight in self.parts.items()}, mix @ self.shift)


@dataclass(frozen=True)
class Network:
    """Value 0 is the input, flat; value k is the ReLU of relus[k - 1]."""

    relus: tuple[Sum, ...]
    outputs: Sum

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs for inputs N x anything, in double precision."""
        values = [x.flatten(1).to(DTYPE).numpy()]
        for relu in self.relus:
            values.append(relu(values).clip(min=0))
        return torch.from_numpy(np.broadcast_to(self.outputs(values), (len(x), len(self.outputs.shift))).copy())

    def needed(self, k: int) -> set[int]:
        """The values that anything after ReLUs k still takes."""
        return {s for later in (*self.relus[k + 1 :], self.outputs) for s in later.parts}
