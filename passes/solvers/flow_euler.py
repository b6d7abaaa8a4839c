"""Euler's method for rectified flow (Liu et al., 2209.03003; shift: Esser et al., 2403.03206).

The network predicts the velocity ``f = eps - x0`` of ``y = (1 - s) x0 + s eps``; a step is ``x' = x + (s' - s) f``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.schedule import Array
from hasten.passes.solvers.table import SolverTable, one_latent


def shifted(sigmas: Array, shift: float) -> Array:
    """Noise levels moved towards the noisy end for large pictures; ``shift = e^mu`` is the "dynamic" shift of FLUX."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def flow_euler(
    steps: int,
    *,
    shift: float = 1.0,
    sigmas: Sequence[float] | None = None,
    stochastic: bool = False,
    compat: str | None = "diffusers",
    train_steps: int = 1000,
) -> SolverTable:
    """Build the table of ``steps`` evaluations over one latent, from noise (s = 1) to data (s = 0).

    ``m`` is the predicted x0. The network is fed ``s * train_steps``. ``sigmas`` (descending, in (0, 1], one a step)
    are shifted once. The default grid is even between 1 and 1 / train_steps; FlowMatchEulerDiscreteScheduler takes its
    ends from levels that are shifted already and then shifts again, which ``compat="diffusers"`` follows and
    ``compat=None`` does not. With ``stochastic`` every step but the last draws new noise: ``x' = (1 - s') x0 + s' z``.
    """
    if compat not in (None, "diffusers"):
        raise UsageError(f"flow-euler: compat is 'diffusers' or None, not {compat!r}")
    if shift <= 0:
        raise UsageError(f"flow-euler: shift is {shift:g}; it must be positive (1 leaves the grid as it is)")
    if steps < 1:
        raise UsageError(f"flow-euler: {steps} sampling steps were asked for; at least 1 is needed")
    if sigmas is None:
        ends = np.array([1.0, 1 / train_steps])
        first, last = (shifted(ends, shift) if compat == "diffusers" else ends).tolist()
        grid = np.linspace(first, last, steps)
    else:
        grid = np.asarray(sigmas, np.float64)
        if len(grid) != steps:
            raise UsageError(f"flow-euler: {steps} steps were asked for with {len(grid)} sigmas; give one sigma a step")
        if not (np.diff(grid) < 0).all() or not 0 < grid[-1] <= grid[0] <= 1:
            raise UsageError("flow-euler: sigmas must descend, from at most 1 to more than 0 (the final 0 is added)")
    here = shifted(grid, shift)
    there = np.append(here[1:], 0.0)
    cy, cf = np.ones(steps), -here  # x0 = y - s f
    if stochastic:
        return one_latent(time=here * train_steps, a=0.0, b=1 - there, c=there, cy=cy, cf=cf)
    # In terms of x0 the step is x' = (s'/s) x + (1 - s'/s) x0.
    ratio = there / here
    return one_latent(time=here * train_steps, a=ratio, b=1 - ratio, c=0.0, cy=cy, cf=cf)
