"""The network around one image, with only the ReLUs that may change sign in its box: all else is affine there.

With x the D inputs that matter, each scaled to [-1, 1], and r the outputs of those ReLUs (U of them, layer after layer),
the inputs of the ReLUs are z = weights @ [x, 1, r], where a ReLU sees only those of the layers before its own. A question
about the box is a row of D + 1 + U numbers: is row . [x, 1, r] > 0 everywhere? For a network trained against an adversary
U is a few hundred where the network has thousands, and everything after this point costs accordingly less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fastrobust.verification.network import DTYPE, Sum

LARGEST = 5 * 10**7  # numbers in a matrix: half a gigabyte in double precision


class TooLarge(Exception):
    """So many ReLUs are open that the reduced network would not fit into memory."""


@dataclass(frozen=True)
class Reduced:
    """weights: float64 U x (D + 1 + U). lower, upper: bounds on z, U. layers: slices of 0..U, one per ReLU layer so far.
    centre, radius: of the box, one for each value of the image; kept: which of these anything still depends on, D.
    values: those of the network that are still needed, by number, each as size x (D + 1 + U)."""

    weights: Tensor
    lower: Tensor
    upper: Tensor
    layers: tuple[slice, ...]
    centre: Tensor
    radius: Tensor
    kept: Tensor
    values: dict[int, sparse.csr_array]

    @staticmethod
    def start(box: tuple[Tensor, Tensor]) -> Reduced:
        """The box itself, from its lower and its upper ends."""
        centre, radius = (box[1] + box[0]) / 2, (box[1] - box[0]) / 2
        empty, count = torch.zeros(0, dtype=DTYPE), len(centre)
        pixels = sparse.hstack([sparse.diags_array(radius.numpy()), sparse.csr_array(centre.numpy()[:, None])], format="csr")
        return Reduced(empty.reshape(0, count + 1), empty, empty, (), centre, radius, torch.arange(count), {0: pixels})

    def to(self, device: torch.device) -> Reduced:
        """With its tensors there, and without the values that a further layer would take."""
        names = ("weights", "lower", "upper", "centre", "radius", "kept")
        return replace(self, values={}, **{name: getattr(self, name).to(device) for name in names})

    @property
    def inputs(self) -> int:
        return len(self.kept)

    def images(self, x: Tensor) -> Tensor:
        """The values of the image (N x all) at inputs (N x D)."""
        full = self.centre.repeat(len(x), 1)
        full[:, self.kept] += self.radius[self.kept] * x
        return full

    def after(self, z: Sum) -> sparse.csr_array:
        """A sum of values as rows over [x, 1, r]."""
        shape = (len(z.shift), self.inputs + 1 + len(self.lower))
        rows = sparse.csr_array((z.shift, (np.arange(shape[0]), np.full(shape[0], self.inputs))), shape=shape)
        for s, weight in z.parts.items():
            rows = weight @ self.values[s] + rows
        return rows.tocsr()

    def extend(self, z: sparse.csr_array, lower: np.ndarray, upper: np.ndarray, needed: set[int]) -> Reduced:
        """With a ReLU on z, rows that `after` gave, which lie between lower and upper (n each). needed: the values, this one
        among them, that something takes later. Raises TooLarge."""
        unstable = np.flatnonzero((lower < 0) & (upper > 0))
        fresh, width = len(unstable), z.shape[1] + len(unstable)
        if max((len(self.lower) + fresh) * width, z.nnz) > LARGEST:
            raise TooLarge
        begun = len(self.lower)
        active = sparse.dia_array(((lower >= 0).astype(float)[None], [0]), shape=(len(lower), len(lower))) @ z
        place = (unstable, z.shape[1] + np.arange(fresh))
        opened = sparse.csr_array((np.ones(fresh), place), shape=(len(lower), width))
        value = (_wider(active.tocsr(), width) + opened).tocsr()
        values = {**self.values, len(self.layers) + 1: value}
        values = {s: _wider(rows, width) for s, rows in values.items() if s in needed}
        join = lambda old, new: torch.cat([old, torch.from_numpy(new)])
        weights = torch.nn.functional.pad(join(self.weights, z[unstable].toarray()), (0, fresh))
        used = (weights != 0).any(0).numpy()
        for rows in values.values():
            used |= abs(rows).sum(0) > 0
        used[self.inputs :] = True
        return Reduced(
            weights[:, torch.from_numpy(used)].contiguous(),
            join(self.lower, lower[unstable]),
            join(self.upper, upper[unstable]),
            (*self.layers, slice(begun, begun + fresh)),
            self.centre,
            self.radius,
            self.kept[torch.from_numpy(used[: self.inputs])],
            {s: rows[:, np.flatnonzero(used)] for s, rows in values.items()},
        )


def _wider(rows: sparse.csr_array, width: int) -> sparse.csr_array:
    return sparse.csr_array((rows.data, rows.indices, rows.indptr), shape=(rows.shape[0], width))
