"""A question about the reduced network as a mixed-integer program for HiGHS (Tjeng et al., 2017).

Variables: the inputs x in their box; for every ReLU whose sign is open its input z, its output r and a binary d. The
program asks for an input at which row . [x, 1, r] is at most the tolerance; if there is none, the row is positive. HiGHS
satisfies constraints up to a tolerance, here 1e-9, far inside that of the margin; an input that it finds counts only once
a forward pass agrees.

HiGHS takes small entries of the matrix for 0. So every ReLU is in units of its largest input, and each equation in units of
its largest entry: what is taken for 0 then is 1e-12 of that, less than the tolerance of a constraint.
"""

import highspy
import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fastrobust.verification.network import DTYPE
from fastrobust.verification.reduced import Reduced

BROKEN = 1e-3  # a row this far below 0 is broken after rounding too
SMALL = 1e-12  # entries that HiGHS takes for 0: the least that it allows


def decide(
    reduced: Reduced,
    row: Tensor,
    tolerance: float,
    seconds: float,
    signs: Tensor | None = None,
    ends: Tensor | None = None,
    span: Tensor | None = None,
) -> tuple[str, Tensor | None]:
    """("verified", None), ("point", an input at which HiGHS finds the row at most the tolerance) or ("timeout", None).
    signs: int8 U, positive or negative for a ReLU that is active or inactive in the part of the box that is asked about,
    else 0. ends: int8 D, -1 or 1 for an input that is at that end of its range there, else 0. span: 2 x U, bounds on the
    inputs of the other ReLUs there."""
    count, inputs, array = len(reduced.lower), reduced.inputs, lambda t: t.cpu().numpy()
    part = lambda rows: (np.delete(array(rows), inputs, -1), array(rows[..., inputs]))  # (of [x, r], constants)
    (weights, shift), (row, constant) = part(reduced.weights), part(row)
    low, high = array(reduced.lower), array(reduced.upper)
    if span is not None:
        low, high = (np.where(array(signs) == 0, new, old) for new, old in zip(array(span), (low, high), strict=True))
    size = np.maximum(np.abs(low), np.abs(high))
    size[size == 0] = 1
    units = np.concatenate([np.ones(inputs), size])
    weights, row, low, high = weights * units, row * units, low / size, high / size
    largest = np.maximum(np.abs(weights).max(1, initial=0), size)
    signs = np.zeros(count) if signs is None else array(signs)
    ends = np.zeros(inputs) if ends is None else array(ends)
    eye, none = sparse.eye_array(count), sparse.csr_array((count, count))
    wide = sparse.hstack([sparse.csr_array((count, inputs)), eye])
    diagonal = lambda values: sparse.dia_array((values[None], [0]), shape=(count, count))
    # columns: x, r, z, d
    blocks = [
        ([sparse.csr_array(-weights / largest[:, None]), diagonal(size / largest), none], *[shift / largest] * 2),  # z = …
        ([wide, -eye, none], np.zeros(count), np.full(count, np.inf)),  # r >= z
        ([wide, -eye, diagonal(-low)], np.full(count, -np.inf), -low),  # r <= z - low (1 - d)
        ([wide, none, diagonal(-high)], np.full(count, -np.inf), np.zeros(count)),  # r <= high d
    ]
    objective = np.concatenate([row, np.zeros(2 * count)])
    matrix = sparse.vstack([sparse.hstack(block) for block, _, _ in blocks] + [sparse.csr_array(objective[None])]).tocsr()

    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_, lp.offset_ = objective, float(constant)
    lp.col_lower_ = np.concatenate([np.where(ends == 0, -1, ends), np.zeros(count), np.where(signs > 0, 0, low), signs > 0])
    lp.col_upper_ = np.concatenate([np.where(ends == 0, 1, ends), high.clip(0), np.where(signs < 0, 0, high), signs >= 0])
    lp.row_lower_ = np.concatenate([*(b[1] for b in blocks), [-np.inf]])
    lp.row_upper_ = np.concatenate([*(b[2] for b in blocks), [tolerance - constant]])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    continuous, integer = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
    lp.integrality_ = [continuous] * (2 * count + inputs) + [integer] * count

    solver = highspy.Highs()
    options = {
        "output_flag": False,
        "threads": 1,
        "time_limit": max(0.1, seconds),
        "primal_feasibility_tolerance": 1e-9,
        "mip_feasibility_tolerance": 1e-9,
        "small_matrix_value": SMALL,
        "objective_target": -BROKEN,  # any such input will do
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    if solver.passModel(lp) == highspy.HighsStatus.kError:  # numbers too large for it
        return "timeout", None
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return "verified", None
    solution = solver.getSolution()
    if solution.value_valid and solver.getInfo().objective_function_value <= tolerance + 1e-6:
        return "point", torch.tensor(solution.col_value[:inputs], dtype=DTYPE)
    return "timeout", None
