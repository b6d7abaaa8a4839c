"""Heun's method as in Karras et al. (2206.00364): two evaluations a step, and one for the step to zero noise."""

from __future__ import annotations

import numpy as np

from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.multistep import table
from hasten.passes.solvers.table import SolverTable


def heun(grid: Grid, *, prediction: str = "epsilon") -> SolverTable:
    """Build Heun's method: 2 N - 1 evaluations, two latents; the last step is Euler's.

    Euler's step, then half the difference of the two slopes on top: the second evaluation corrects the sample that the
    network has just seen, so nothing but the first slope is kept.
    """
    grid = grid.with_unscaled_end()
    scale, coordinate, slope = grid.line
    n = len(grid)
    # Level i is evaluated twice, as the target of one step and the start of the next, except for the first.
    visited = np.array([0, *np.repeat(np.arange(1, n), 2)])
    rows = 2 * n - 1
    a, b = np.zeros((rows, 2, 2)), np.zeros((rows, 2))
    for row, i in enumerate(visited):
        if row % 2 == 0:
            a[row, 0, 0] = scale[i + 1] / scale[i]
            b[row] = scale[i + 1] * (coordinate[i + 1] - coordinate[i]), 1
        else:
            half = scale[i] * (coordinate[i] - coordinate[i - 1]) / 2
            a[row, 0] = 1, -half
            b[row, 0] = half
    return table(grid, a=a, b=b, prediction=prediction, quantity=slope, visited=visited)
