"""Euler's method for rectified flow (Liu et al., 2209.03003; shift: Esser et al., 2403.03206).

The network predicts the velocity ``f = eps - x0`` of ``y = (1 - s) x0 + s eps``; a step is ``x' = x + (s' - s) f``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hasten.passes.solvers.euler import euler
from hasten.passes.solvers.flow_grid import flow_grid
from hasten.passes.solvers.levels import shifted as shifted
from hasten.passes.solvers.multistep import Update, multistep
from hasten.passes.solvers.table import SolverTable


def flow_euler(
    steps: int,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    time_shift: str = "exponential",
    terminal: float | None = None,
    levels: str = "model",
    spacing: str = "linspace",
    sigmas: Sequence[float] | None = None,
    times: Sequence[float] | None = None,
    stochastic: bool = False,
    invert: bool = False,
    prediction: str = "flow_prediction",
    compat: str | None = "diffusers",
    train_steps: int = 1000,
) -> SolverTable:
    """Build the table of ``steps`` evaluations over one latent, from noise (s = 1) to data (s = 0).

    The network is fed ``s * train_steps``. ``sigmas`` (descending, in (0, 1], one a step) are shifted once. The default
    grid is even between 1 and 1 / train_steps; FlowMatchEulerDiscreteScheduler takes its ends from levels that are
    shifted already and then shifts again, which ``compat="diffusers"`` follows and ``compat=None`` does not. The other
    options of the grid: see `flow_grid`. With ``stochastic`` every step but the last draws new noise:
    ``x' = (1 - s') x0 + s' z``. ``invert``: see `inverted`.
    """
    grid = flow_grid(
        steps,
        shift=shift,
        mu=mu,
        time_shift=time_shift,
        terminal=terminal,
        levels=levels,
        spacing=spacing,
        sigmas=sigmas,
        times=times,
        train_steps=train_steps,
        compat=compat,
        solver="flow-euler",
    )
    if stochastic:
        updates = [Update(0.0, [1 - s], s) for s in grid.noise[1:].tolist()]
        table = multistep(grid, updates, prediction=prediction, quantity="x0")
    else:
        table = euler(grid, prediction=prediction)
    return inverted(table, train_steps) if invert else table


def inverted(table: SolverTable, train_steps: int) -> SolverTable:
    """The same sampler for a network that is told 1 - s and predicts x0 - eps; of Mochi and Z-Image."""
    return replace(table, time=train_steps - table.time, cf=-table.cf, direct=-table.direct)
