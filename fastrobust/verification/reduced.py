"""The network around one image, with only the ReLUs that may change sign in its box: all else is affine there.

With r the outputs of those ReLUs (U of them, layer after layer) and x the D inputs, the inputs of the ReLUs are
z = weights @ [r, x, 1], where a ReLU sees only those of the layers before its own. A question about the box is a row of
U + D + 1 numbers: is row . [r, x, 1] > 0 everywhere? For a network trained against an adversary U is a few hundred
where the network has thousands, and everything after this point costs accordingly less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fastrobust.verification.bounds import Box
from fastrobust.verification.network import DTYPE, Network


@dataclass(frozen=True)
class Reduced:
    """weights: float64 U x (U + D + 1). lower, upper: bounds on z, U. layers: slices of 0..U, one per ReLU layer. box: D
    each, normalised pixels. outputs: the outputs of the last of these ReLU layers, all n of them, as n x (U + D + 1)."""

    weights: Tensor
    lower: Tensor
    upper: Tensor
    layers: tuple[slice, ...]
    box: Box
    outputs: sparse.csr_array

    @property
    def size(self) -> int:
        return len(self.lower)

    def questions(self, rows, shifts: np.ndarray) -> Tensor:
        """rows (m x n, sparse or not) . outputs + shifts (m) as questions, float64 m x (U + D + 1)."""
        found = (self.outputs.T @ rows.T).T
        found = found.toarray() if sparse.issparse(found) else np.ascontiguousarray(found)
        found[:, -1] += shifts
        return torch.from_numpy(found)


class Matrices:
    """The layers of a network as sparse matrices, outputs x inputs, made once."""

    def __init__(self, network: Network):
        self.weights, self.shifts = [], []
        for layer in network.layers:
            size = int(np.prod(layer.outputs))
            self.weights.append(sparse.csr_array(layer.transposed(torch.eye(size, dtype=DTYPE)).reshape(size, -1).numpy()))
            self.shifts.append(layer.shift().flatten().numpy())
        self.sizes = [abs(weight) for weight in self.weights]

    def interval(self, k: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The outputs of layer k over a box of its inputs."""
        centre = self.weights[k] @ ((upper + lower) / 2) + self.shifts[k]
        radius = self.sizes[k] @ ((upper - lower) / 2)
        return centre - radius, centre + radius


def reduce(matrices: Matrices, hidden: list[Box], box: Box) -> Reduced:
    """hidden: bounds on the inputs of the first ReLU layers, of one image; the others are left out. All flat."""
    bounds = [(lower.numpy(), upper.numpy()) for lower, upper in hidden]
    unstable = [np.flatnonzero((low < 0) & (high > 0)) for low, high in bounds]
    count, inputs = sum(map(len, unstable)), len(box[0])
    width = count + inputs + 1
    place = (np.arange(inputs), count + np.arange(inputs))
    outputs = sparse.csr_array((np.ones(inputs), place), shape=(inputs, width))
    rows, lower, upper, layers, begun = [], [], [], [], 0
    for k, ((low, high), mine) in enumerate(zip(bounds, unstable, strict=True)):
        shift = matrices.shifts[k]
        constant = sparse.csr_array(
            (shift, (np.arange(len(shift)), np.full(len(shift), width - 1))), shape=(len(shift), width)
        )
        z = (matrices.weights[k] @ outputs + constant).tocsr()
        rows.append(z[mine].toarray())
        lower.append(low[mine])
        upper.append(high[mine])
        layers.append(slice(begun, begun + len(mine)))
        active = sparse.dia_array(((low >= 0).astype(float)[None], [0]), shape=(len(low), len(low)))
        fresh = sparse.csr_array((np.ones(len(mine)), (mine, begun + np.arange(len(mine)))), shape=z.shape)
        outputs = (active @ z + fresh).tocsr()
        begun += len(mine)
    tensor = lambda parts: torch.from_numpy(np.concatenate(parts))
    return Reduced(tensor(rows), tensor(lower), tensor(upper), tuple(layers), box, outputs)
