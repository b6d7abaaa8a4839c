"""iPNDM, improved PNDM (Zhang & Chen, 2204.13902, section 4): Adams-Bashforth from order 1 up, on a sine schedule.

diffusers' version has a schedule of its own, ``a^2 = 1 - sin(pi / 2 u)^4`` and ``b = sin(pi / 2 u)^2`` for u from 1
down, tells the network an angle, and expects v.
"""

from __future__ import annotations

import math

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.multistep import Update, multistep
from hasten.passes.solvers.pndm import ADAMS_BASHFORTH
from hasten.passes.solvers.table import SolverTable

SMALLEST_SIGNAL = 1e-8
"""What diffusers divides by where the signal level is zero."""


def ipndm(steps: int, *, compat: str | None = "diffusers") -> SolverTable:
    """Build iPNDM: one evaluation a step, four latents. `defects.IGNORED_FIRST_PREDICTION`.

    The first level has no signal. There ``(y - b eps) / a`` is 0 / 0; the network's own x0 is ``-v``.
    """
    if steps < 1:
        raise UsageError(f"ipndm: {steps} sampling steps were asked for; at least 1 is needed")
    ignored = defects.follows(compat, defects.IGNORED_FIRST_PREDICTION, solver="ipndm")
    level = np.linspace(1, 0, steps + 1)
    noise = np.sin(level * math.pi / 2) ** 2
    signal = np.sqrt(1 - noise**2)
    grid = Grid(np.arctan2(noise, signal)[:-1] / math.pi * 2, signal, noise)
    updates = []
    for i in range(steps):
        a, b, following, less = signal[i], noise[i], signal[i + 1], noise[i + 1]
        mixture = np.array(ADAMS_BASHFORTH[min(i + 1, 4) - 1])
        if a > SMALLEST_SIGNAL:
            updates.append(Update(following / a, (less - following * b / a) * mixture))
        elif ignored:
            updates.append(Update(following / SMALLEST_SIGNAL, (less - following * b / SMALLEST_SIGNAL) * mixture))
        else:
            updates.append(Update(0.0, less * mixture))
    table = multistep(grid, updates, prediction="v_prediction", quantity="eps")
    if ignored or not steps:
        return table
    return _first_prediction(table, float(signal[1]))


def _first_prediction(table: SolverTable, signal: float) -> SolverTable:
    """Add the network's own x0 = -v to the first step, beside the eps that it steps with."""
    direct = np.zeros((len(table), table.width))
    direct[0, 0] = -signal
    return SolverTable(**{**vars(table), "direct": direct})
