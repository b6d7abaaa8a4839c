"""Euler's method, Adams-Bashforth on uneven levels (LMS) and ancestral sampling, as in Karras et al. (2206.00364).

All move along the line on which the solution has the slope that the network predicts: ``x / a`` over ``b / a`` for
diffusion, x over b for flow. The latent here is x itself, which the network sees.
"""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.lagrange import integrals
from hasten.passes.solvers.multistep import Update, multistep
from hasten.passes.solvers.table import SolverTable


def euler(grid: Grid, *, prediction: str = "epsilon") -> SolverTable:
    """Build Euler's method: one evaluation a level, one latent."""
    return lms(grid, prediction=prediction, order=1)


def lms(grid: Grid, *, prediction: str = "epsilon", order: int = 4, compat: str | None = "diffusers") -> SolverTable:
    """Build Adams-Bashforth of ``order`` on the levels as they are: one evaluation a level, ``order`` latents.

    It starts with order 1 and grows. diffusers integrates the polynomials numerically, to 1e-4 of themselves or
    better; here they are integrated exactly. `defects.MISSING_HISTORY`, of a grid that starts late.
    """
    if order < 1:
        raise UsageError(f"lms: order is {order}; it starts at 1")
    grid = grid.with_unscaled_end()
    scale, coordinate, slope = grid.line
    oldest = 0 if defects.follows(compat, defects.MISSING_HISTORY, solver="lms") else grid.first
    updates = []
    for i in range(grid.first, len(grid)):
        nodes = coordinate[max(oldest, i - order + 1) : i + 1][::-1]
        gains = integrals(nodes, float(coordinate[i + 1])) * scale[i + 1]
        updates.append(Update(float(scale[i + 1] / scale[i]), gains[: i + 1 - grid.first]))
    return multistep(grid, updates, prediction=prediction, quantity=slope)


def ancestral(grid: Grid, *, prediction: str = "epsilon") -> SolverTable:
    """Build ancestral sampling for diffusion: a step further down than asked, and noise to come back up."""
    if grid.path == "flow":
        raise UsageError("euler-ancestral: it is for diffusion; flow-euler:stochastic=true draws noise for a flow")
    grid = grid.with_unscaled_end()
    scale, level, slope = grid.line
    here, there = level[:-1], level[1:]
    up = there * np.sqrt(np.maximum(here**2 - there**2, 0)) / here
    down = np.sqrt(there**2 - up**2)
    updates = [
        Update(float(scale[i + 1] / scale[i]), [scale[i + 1] * (down[i] - here[i])], float(scale[i + 1] * up[i]))
        for i in range(grid.first, len(grid))
    ]
    return multistep(grid, updates, prediction=prediction, quantity=slope)
