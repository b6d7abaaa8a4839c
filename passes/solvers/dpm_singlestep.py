"""DPM-Solver and DPM-Solver++ in their singlestep form (2206.00927, 2211.01095): stages, and no history.

A step of order p spans p intervals of the grid: its stages are the grid's levels in between, and each of them
restarts from the sample at the step's beginning.
"""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.dpm_solver import Interval, check, sde_sign_defect
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.multistep import table
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.table import SolverTable


def dpm_singlestep(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    order: int = 2,
    form: str = "data",
    slope: str = "midpoint",
    lower_order_final: bool = False,
    compat: str | None = "diffusers",
) -> SolverTable:
    """Build the singlestep solver of ``order`` 1 to 3: one evaluation a level.

    Levels that are left over, and the end where it has no noise, take lower orders, as with ``lower_order_final``.
    A run that starts late, within a step, takes what is left of it for one of lower order.
    Order 3 with ``slope="midpoint"`` uses the last stage alone. `defects.SDE_SECOND_DIFFERENCE_SIGN` applies to order 3
    in the sde-data form with heun. In that form a stage and the step behind it draw noise of their own, as in
    diffusers, so that the variance is of order 1 whatever ``order`` is. Latents: x, the step's first x, and the values
    there and at its stages.
    """
    check("dpm-singlestep", order, form, slope, grid)
    if form == "sde-noise":
        raise UsageError("dpm-singlestep: there is no singlestep solver in the sde-noise form; take dpm-solver")
    sign = defects.follows(compat, defects.SDE_SECOND_DIFFERENCE_SIGN, solver="dpm-singlestep")
    counted = orders(len(grid), order, lower_order_final, grid.ends_at_zero)[grid.first :]
    n, k = len(counted), order + 1 if order > 1 else 1
    a, b, c = np.zeros((n, k, k)), np.zeros((n, k)), np.zeros((n, k))
    for i, p in enumerate(min(p, i + 1) for i, p in enumerate(counted)):
        level = grid.first + i
        interval = Interval(grid, level - p + 1, level + 1, form)
        gains = stage_gains(interval, p, slope, sign and form == "sde-data")
        c[i, 0] = interval.kick
        a[i, 0, 0 if p == 1 else 1] = interval.carry
        a[i, 0, 2 : 1 + p] = gains[:-1]
        b[i, 0] = gains[-1]
        if k == 1:
            continue
        if p == 1:  # x is the first of a step: keep it, and the value there
            a[i, 1, 0], b[i, 2] = 1, 1
        else:
            a[i, 1, 1] = a[i, 2, 2] = 1
            if p + 1 < k:
                b[i, p + 1] = 1
            if p == 3:
                a[i, 3, 3] = 1
    return table(grid, a=a, b=b, c=c, prediction=prediction, quantity="x0" if form.endswith("data") else "eps")


def stage_gains(interval: Interval, p: int, slope: str, wrong_sign: bool) -> Array:
    """Weigh the values at the p levels of a step that has got so far, oldest first."""
    nodes = range(interval.start, interval.stop)
    if p < 3:
        return interval.gains(nodes, slope)
    if slope == "heun":
        return interval.gains(nodes, slope, sde_sign_defect(interval) if wrong_sign else 1.0)
    first, last = interval.gains([nodes[0], nodes[2]], "heun")
    return np.array([first, 0.0, last])


def orders(n: int, order: int, lower_order_final: bool, ends_at_zero: bool) -> list[int]:
    """List the order of each evaluation: 1, 2, ... up to ``order``, then again."""
    if lower_order_final or ends_at_zero or n % order:
        whole = (n - 1) // order if order > 1 else n
        rest = n - whole * order
        # What is left after the last whole step counts up, but never to ``order``; the last is 1 where that is even.
        tail = list(range(1, rest + 1))
        if rest == order:
            tail[-1] = 1
        result = list(range(1, order + 1)) * whole + tail
    else:
        result = list(range(1, order + 1)) * (n // order)
    if ends_at_zero:
        result[-1] = 1
    return result
