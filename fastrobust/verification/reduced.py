"""The network around one image, with only the ReLUs that may change sign in its box: all else is affine there.

With x the D inputs that matter, each scaled to [-1, 1], and r the outputs of those ReLUs (U of them, layer after layer),
the inputs of the ReLUs are z = weights @ [x, 1, r], where a ReLU sees only those of the layers before its own. A question
about the box is a row of D + 1 + U numbers: is row . [x, 1, r] > 0 everywhere? For a network trained against an adversary
U is a few hundred where the network has thousands, and everything after this point costs accordingly less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fastrobust.verification.network import DTYPE, Network

ROUNDING = 1e-9  # every bound is widened by it: far above what the additions behind a bound lose in double precision


class Matrices:
    """The layers of a network as sparse matrices, outputs x inputs, made once."""

    def __init__(self, network: Network):
        self.weights, self.shifts = [], []
        for layer in network.layers:
            size = int(np.prod(layer.outputs))
            self.weights.append(sparse.csr_array(layer.transposed(torch.eye(size, dtype=DTYPE)).reshape(size, -1).numpy()))
            self.shifts.append(layer.shift().flatten().numpy())
        self.sizes = [abs(weight) for weight in self.weights]

    def __len__(self) -> int:
        return len(self.weights)

    def interval(self, k: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The outputs of layer k over a box of its inputs."""
        centre = self.weights[k] @ ((upper + lower) / 2) + self.shifts[k]
        radius = self.sizes[k] @ ((upper - lower) / 2) + ROUNDING
        return centre - radius, centre + radius


@dataclass(frozen=True)
class Reduced:
    """weights: float64 U x (D + 1 + U). lower, upper: bounds on z, U. layers: slices of 0..U, one per ReLU layer so far.
    centre, radius: of the box, one for each value of the image; kept: which of these anything still depends on, D.
    outputs: of the last layer so far, all n, as n x (D + 1 + U)."""

    weights: Tensor
    lower: Tensor
    upper: Tensor
    layers: tuple[slice, ...]
    centre: Tensor
    radius: Tensor
    kept: Tensor
    outputs: sparse.csr_array

    @staticmethod
    def start(box: tuple[Tensor, Tensor]) -> Reduced:
        """The box itself, from its lower and its upper ends."""
        centre, radius = (box[1] + box[0]) / 2, (box[1] - box[0]) / 2
        empty, count = torch.zeros(0, dtype=DTYPE), len(centre)
        outputs = sparse.hstack(
            [sparse.diags_array(radius.numpy()), sparse.csr_array(centre.numpy()[:, None])], format="csr"
        )
        return Reduced(empty.reshape(0, count + 1), empty, empty, (), centre, radius, torch.arange(count), outputs)

    @property
    def inputs(self) -> int:
        return len(self.kept)

    def images(self, x: Tensor) -> Tensor:
        """The values of the image (N x all) at inputs (N x D)."""
        full = self.centre.repeat(len(x), 1)
        full[:, self.kept] += self.radius[self.kept] * x
        return full

    def after(self, weight, shift: np.ndarray) -> sparse.csr_array:
        """weight @ outputs + shift as rows over [x, 1, r]."""
        place = (np.arange(len(shift)), np.full(len(shift), self.inputs))
        return (weight @ self.outputs + sparse.csr_array((shift, place), shape=(len(shift), self.outputs.shape[1]))).tocsr()

    def extend(self, z: sparse.csr_array, lower: np.ndarray, upper: np.ndarray) -> Reduced:
        """With a ReLU on z, the rows that `after` gave, which lie between lower and upper (n each)."""
        unstable = np.flatnonzero((lower < 0) & (upper > 0))
        fresh, width = len(unstable), z.shape[1] + len(unstable)
        begun = len(self.lower)
        active = sparse.dia_array(((lower >= 0).astype(float)[None], [0]), shape=(len(lower), len(lower))) @ z
        active.resize((len(lower), width))
        place = (unstable, z.shape[1] + np.arange(fresh))
        outputs = (active + sparse.csr_array((np.ones(fresh), place), shape=(len(lower), width))).tocsr()
        join = lambda old, new: torch.cat([old, torch.from_numpy(new)])
        weights = torch.nn.functional.pad(join(self.weights, z[unstable].toarray()), (0, fresh))
        used = (weights != 0).any(0).numpy() | (abs(outputs).sum(0) > 0)
        used[self.inputs :] = True
        return Reduced(
            weights[:, torch.from_numpy(used)].contiguous(),
            join(self.lower, lower[unstable]),
            join(self.upper, upper[unstable]),
            (*self.layers, slice(begun, begun + fresh)),
            self.centre,
            self.radius,
            self.kept[torch.from_numpy(used[: self.inputs])],
            outputs[:, np.flatnonzero(used)],
        )
