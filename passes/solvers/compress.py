"""From a response matrix back to a recurrence, with as few latents as there can be.

What the future still needs of the past is a linear function of the first noise, the outputs and the fresh noise so far:
the block of the response matrix below row i and left of column i, whose rank is the number of latents that must be
carried past evaluation i (Ho & Kalman, 1966). An orthonormal basis of its rows is a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import HastenError, UsageError
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.table import SolverTable


def compress(response: Array, time: Any, noisy: tuple[int, ...] = (), *, tolerance: float = 1e-10) -> SolverTable:
    """Build the smallest table with a response matrix, to ``tolerance`` of each row's largest coefficient.

    ``response`` (M + 1, 1 + M + Z) and ``noisy``, the rows that take noise: see `SolverTable.response`. `UsageError`
    where a row depends on what comes later, `HastenError` where the table does not repeat the matrix to ten times the
    tolerance.
    """
    m = len(time)
    if response.shape != (m + 1, 1 + m + len(noisy)):
        raise UsageError(
            f"compress: {m} evaluations with noise in {len(noisy)} need a matrix of {(m + 1, 1 + m + len(noisy))}, "
            f"not {response.shape}"
        )
    matrix = _in_order(response, m, noisy)
    future = np.arange(matrix.shape[1])[None, :] > 2 * np.arange(m + 1)[:, None]
    if matrix[future].any():
        raise UsageError("compress: an evaluation depends on a later one; a response matrix is lower triangular")
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scaled = matrix / np.where(largest == 0, 1, largest)
    bases = [np.ones((1, 1)), *(_basis(scaled[i + 1 :, : 3 + 2 * i], tolerance) for i in range(m))]
    k = max(len(basis) for basis in bases)
    inputs, a, b, c, output = np.zeros((m, k)), np.zeros((m, k, k)), np.zeros((m, k)), np.zeros((m, k)), np.zeros(k)
    for i in range(m):
        before, after = bases[i], bases[i + 1]
        inputs[i, : len(before)] = matrix[i, : before.shape[1]] @ before.T
        a[i, : len(after), : len(before)] = after[:, :-2] @ before.T
        b[i, : len(after)] = after[:, -2]
        if i in noisy:
            c[i, : len(after)] = after[:, -1]
    output[: len(bases[m])] = matrix[m] @ bases[m].T
    table = SolverTable(time=time, input=inputs, A=a, B=b, C=c, cy=np.zeros(m), cf=np.ones(m), output=output, init=1.0)
    error = _error(table, response, noisy)
    if error > 10 * tolerance:
        raise HastenError(
            f"compress: the smallest table differs from the matrix by {error:.1e}, more than {tolerance:g}"
        )
    return table


def _in_order(response: Array, m: int, noisy: tuple[int, ...]) -> Array:
    """Sort the columns by when they arrive: first noise, then output and fresh noise of every evaluation."""
    matrix = np.zeros((m + 1, 1 + 2 * m))
    matrix[:, 0] = response[:, 0]
    matrix[:, 1::2] = response[:, 1 : 1 + m]
    for j, row in enumerate(noisy):
        matrix[:, 2 + 2 * row] = response[:, 1 + m + j]
    return matrix


def _basis(block: Array, tolerance: float) -> Array:
    """An orthonormal basis of the block's rows, at least one."""
    _, strength, basis = np.linalg.svd(block, full_matrices=False)
    return np.asarray(basis[: max(1, int((strength > strength[0] * tolerance).sum()))])


def _error(table: SolverTable, response: Array, noisy: tuple[int, ...]) -> float:
    """The largest difference, relative to the largest coefficient of its row."""
    got, m = table.response(), len(table)
    full: npt.NDArray[np.float64] = np.zeros_like(response)
    full[:, : 1 + m] = got[:, : 1 + m]
    for j, row in enumerate(noisy):
        if row in table.noisy:
            full[:, 1 + m + j] = got[:, 1 + m + table.noisy.index(row)]
    largest = np.abs(response).max(axis=1, keepdims=True)
    return float((np.abs(full - response) / np.where(largest == 0, 1, largest)).max())
