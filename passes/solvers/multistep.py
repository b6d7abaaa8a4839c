"""Tables of methods that remember earlier evaluations: ``x <- c x + g_0 m_i + g_1 m_{i-1} + … + n z``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.prediction import Array, convert
from hasten.passes.solvers.table import SolverTable


@dataclass(frozen=True)
class Update:
    """One row: ``carry`` of x, ``gains`` on the newest evaluation and those before it, ``kick`` of the noise."""

    carry: float
    gains: Sequence[float] | Array
    kick: float = 0.0


def multistep(grid: Grid, updates: Sequence[Update], *, prediction: str, quantity: str) -> SolverTable:
    """Build the table: latents are x, which the network sees, and as many earlier values as the longest row needs.

    ``quantity`` is what the method integrates, as for `convert`.
    """
    m, k = len(updates), max(len(u.gains) for u in updates)
    a, b, c = np.zeros((m, k, k)), np.zeros((m, k)), np.zeros((m, k))
    for i, update in enumerate(updates):
        earlier = update.gains[1:]
        a[i, 0, 0], a[i, 0, 1 : 1 + len(earlier)] = update.carry, earlier
        b[i, 0], c[i, 0] = update.gains[0], update.kick
        if k > 1:
            b[i, 1] = 1
        for j in range(2, k):
            a[i, j, j - 1] = 1
    return table(grid, a=a, b=b, c=c, prediction=prediction, quantity=quantity)


def table(
    grid: Grid,
    *,
    a: Array,
    b: Array,
    c: Array | None = None,
    prediction: str,
    quantity: str,
    visited: npt.NDArray[np.int64] | None = None,
) -> SolverTable:
    """Build a table whose first latent is what the network sees, and at the end the result.

    Row i evaluates at level ``visited[i]``; every level once, in order, unless told otherwise.
    """
    visited = np.arange(grid.first, len(grid)) if visited is None else visited
    signal, noise = grid.signal[visited], grid.noise[visited]
    cy, cf = convert(prediction, quantity, signal, noise)
    first = np.eye(a.shape[1])[0]
    return SolverTable(
        time=grid.time[visited],
        input=np.tile(first, (len(a), 1)),
        A=a,
        B=b,
        C=np.zeros_like(b) if c is None else c,
        cy=cy,
        cf=cf,
        output=first,
        init=1.0 if grid.first else grid.init,
        clean=clean(quantity, signal, noise),
        level=np.stack([np.append(signal, grid.signal[-1]), np.append(noise, grid.noise[-1])], 1),
    )


def clean(quantity: str, signal: Array, noise: Array) -> Array:
    """Return how x0 follows from the network's input and what the solver integrates, (M, 2); see `SolverTable`."""
    if quantity == "x0":
        return np.tile([0.0, 1.0], (len(signal), 1))
    if quantity == "eps":  # y = a x0 + b eps, which leaves x0 open where a is zero
        divisor, factor = np.where(signal == 0, 1.0, signal), noise
    else:  # y = (a + b) x0 + b velocity
        divisor, factor = signal + noise, noise
    return np.stack([1 / divisor, -factor / divisor], 1)
