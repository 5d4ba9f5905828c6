"""One image against one other class as a mixed-integer program for HiGHS (Tjeng et al., 2017).

Variables: the inputs in their box, the outputs y of the ReLUs that may be active, and for each whose sign is open its input v
and a binary d. The program asks for an input whose margin is at most the tolerance; if there is none, the class holds.
HiGHS satisfies constraints up to a tolerance, here 1e-9, far inside that of the margin; an input that it finds counts only
once the caller has checked it by a forward pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastrobust.errors import FastrobustError
from fastrobust.verification.bounds import Box
from fastrobust.verification.network import DTYPE, Network


class Rows:
    """Sparse rows low <= a . variables <= high, and the bounds of the variables, as they are added."""

    def __init__(self):
        self.entries, self.low, self.high = [], [], []
        self.lower, self.upper, self.integer = [], [], []
        self.count = self.columns = 0

    def variables(self, lower: np.ndarray, upper: np.ndarray, integer: bool = False) -> np.ndarray:
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(np.full(len(lower), integer))
        self.columns += len(lower)
        return np.arange(self.columns - len(lower), self.columns)

    def add(self, low, high, *terms) -> None:
        """terms: (columns, coefficients), one column and number per row, or (columns, matrix), rows x columns."""
        count = max(len(t[1]) if np.ndim(t[1]) == 1 else t[1].shape[0] for t in terms)
        for columns, values in terms:
            if values.ndim == 1:
                self.entries.append((np.arange(count) + self.count, columns, values))
            else:
                sparse = values.tocoo()
                self.entries.append((sparse.row + self.count, columns[sparse.col], sparse.data))
        self.low.append(np.broadcast_to(low, count))
        self.high.append(np.broadcast_to(high, count))
        self.count += count


class Matrices:
    """The layers of a network under its last one as sparse matrices, made once: outputs x inputs."""

    def __init__(self, network: Network):
        from scipy.sparse import csr_matrix

        self.weights, self.shifts = [], []
        for layer in network.layers[:-1]:
            size = int(np.prod(layer.outputs))
            self.weights.append(csr_matrix(layer.transposed(torch.eye(size, dtype=DTYPE)).reshape(size, -1).numpy()))
            self.shifts.append(layer.shift().flatten().numpy())


def decide(
    matrices: Matrices, hidden: list[Box], box: Box, row: Tensor, shift: Tensor, tolerance: float, seconds: float
) -> tuple[str, Tensor | None]:
    """("verified", None), ("point", an input of the box at which HiGHS finds the margin at most the tolerance) or ("timeout",
    None). hidden and box: of one image (B = 1); row and shift: the margin on the outputs of the last hidden layer."""
    try:
        import highspy
        from scipy.sparse import csr_matrix
    except ImportError:
        raise FastrobustError("verification's last step needs HiGHS: pip install 'fastrobust[verify]'") from None

    rows = Rows()
    before = rows.variables(*(side.flatten().numpy() for side in box))
    alive = np.arange(len(before))
    for weight, bias, (low, high) in zip(matrices.weights, matrices.shifts, hidden, strict=True):
        low, high = low.flatten().numpy(), high.flatten().numpy()
        kept = np.flatnonzero(high > 0)
        low, high, bias, weight = low[kept], high[kept], bias[kept], weight[kept][:, alive]
        y = rows.variables(np.maximum(low, 0), high)
        active, open_ = np.flatnonzero(low >= 0), np.flatnonzero(low < 0)
        one = np.ones(len(open_))
        if len(active):
            rows.add(bias[active], bias[active], (y[active], np.ones(len(active))), (before, -weight[active]))
        if len(open_):
            v = rows.variables(low[open_], high[open_])
            d = rows.variables(0 * one, one, integer=True)
            rows.add(bias[open_], bias[open_], (v, one), (before, -weight[open_]))
            rows.add(0, np.inf, (y[open_], one), (v, -one))  # y >= v
            rows.add(-np.inf, -low[open_], (y[open_], one), (v, -one), (d, -low[open_]))  # y <= v - low (1 - d)
            rows.add(-np.inf, 0, (y[open_], one), (d, -high[open_]))  # y <= high d
        before, alive = y, kept
    margin = row.numpy()[alive]
    rows.add(-np.inf, tolerance - shift.item(), (before, csr_matrix(margin[None])))

    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = rows.columns, rows.count
    lp.col_cost_ = np.zeros(rows.columns)
    cost = np.zeros(rows.columns)
    cost[before] = margin
    lp.col_cost_, lp.offset_ = cost, shift.item()
    lp.col_lower_, lp.col_upper_ = np.concatenate(rows.lower), np.concatenate(rows.upper)
    lp.row_lower_, lp.row_upper_ = np.concatenate(rows.low), np.concatenate(rows.high)
    r, c, v = (np.concatenate(parts) for parts in zip(*rows.entries, strict=True))
    sparse = csr_matrix((v, (r, c)), shape=(rows.count, rows.columns))
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = sparse.indptr, sparse.indices, sparse.data
    integer = np.concatenate(rows.integer)
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    lp.integrality_ = [kinds[int(i)] for i in integer]

    solver = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "threads": 1,
        "time_limit": max(0.1, seconds),
        "primal_feasibility_tolerance": 1e-9,
        "mip_feasibility_tolerance": 1e-9,
        "objective_target": tolerance,
        "mip_max_improving_sols": 1,
    }.items():
        solver.setOptionValue(name, value)
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return "verified", None
    solution = solver.getSolution()
    if solution.value_valid and solver.getInfo().objective_function_value <= tolerance + 1e-6:
        x = torch.tensor(solution.col_value[: box[0].numel()], dtype=DTYPE)
        return "point", x.clamp(box[0].flatten(), box[1].flatten())
    return "timeout", None
