"""Grids of rectified flow: levels s from 1 (noise) to 0 (data), ``y = (1 - s) x0 + s eps``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hasten.errors import UsageError, nearest
from hasten.passes.solvers import defects
from hasten.passes.solvers.dynamic_shift import EXPONENTIAL, TIME_SHIFTS
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.levels import LEVELS, chosen, shifted, stretched
from hasten.passes.solvers.prediction import Array

STARTS = ("one", "below", "almost")
"""The highest level of the default grid: 1; one training step below it; or 1, kept off it by 1e-6 so that its log-SNR
is finite. FlowMatchEuler, DPM-Solver and UniPC, in this order."""
SPACINGS = ("linspace", "trailing")
"""The default grid that starts at 1: to the last training time; or in equal steps to the end, so that the last of n
levels is 1 / n, as diffusers' pipelines of FLUX and others ask for."""


def flow_grid(
    steps: int,
    *,
    start: str = "one",
    spacing: str = "linspace",
    shift: float = 1.0,
    mu: float | None = None,
    time_shift: str = EXPONENTIAL,
    terminal: float | None = None,
    levels: str = "model",
    end: str = "zero",
    sigmas: Sequence[float] | None = None,
    times: Sequence[float] | None = None,
    train_steps: int = 1000,
    compat: str | None = "diffusers",
    solver: str = "flow",
) -> Grid:
    """Build the grid of ``steps`` levels; the network is told ``s * train_steps``. ``spacing``: see `SPACINGS`.

    Levels are moved by ``shift``, or by ``mu`` (``shift = e^mu``; with ``time_shift="linear"``, mu itself), then
    stretched so that the last is ``terminal``. ``sigmas``, or ``times`` to be told, are the caller's own: descending,
    one a step, moved all the same. ``end="sigma_min"`` ends at 1 / train_steps, moved. `defects.SHIFTED_TWICE` (where
    the start is 1), `defects.WHOLE_TIMES` (elsewhere), `defects.REPEATED_END`.
    """
    for name, value, choices in (
        ("start", start, STARTS),
        ("spacing", spacing, SPACINGS),
        ("levels", levels, LEVELS),
        ("time_shift", time_shift, TIME_SHIFTS),
        ("end", end, ("zero", "sigma_min")),
    ):
        if value not in choices:
            raise UsageError(f"{solver}: {name} {value!r} is none of {', '.join(choices)}.{nearest(value, choices)}")
    if steps < 1:
        raise UsageError(f"{solver}: {steps} sampling steps were asked for; at least 1 is needed")
    factor = _factor(solver, shift, mu, time_shift)
    twice = mu is None and start == "one" and defects.follows(compat, defects.SHIFTED_TWICE, solver=solver)
    if sigmas is not None or times is not None:
        given = np.asarray(sigmas if sigmas is not None else times, np.float64)
        here = _descending(solver, given if sigmas is not None else given / train_steps, steps)
    elif spacing == "trailing":
        here = np.arange(steps, 0, -1) / steps
    else:
        here = _even(steps, start, train_steps, factor if twice else 1.0)
    here = shifted(here, factor)
    if terminal is not None:
        here = stretched(here, terminal)
    if levels != "model":
        here = chosen(levels, float(here[0]), float(here[-1]), steps)
    if start == "almost" and here[0] > 1 - 1e-6:
        here[0] -= 1e-6
    told = here * train_steps
    if times is not None:
        told = np.asarray(times, np.float64)
    elif start != "one" and defects.follows(compat, defects.WHOLE_TIMES, solver=solver):
        told = np.floor(told)
    last = 0.0
    if end == "sigma_min":
        repeat = defects.follows(compat, defects.REPEATED_END, solver=solver)
        last = float(here[-1] if repeat else shifted(np.array(1 / train_steps), factor))
    noise = np.append(here, last)
    return Grid(told, 1 - noise, noise, path="flow")


def _even(steps: int, start: str, train_steps: int, factor: float) -> Array:
    """The default levels before they are moved."""
    if start == "one":
        first, last = shifted(np.array([1.0, 1 / train_steps]), factor).tolist()
        return np.linspace(first, last, steps)
    if start == "below":
        return 1 - np.linspace(1, 1 / train_steps, steps + 1)[:0:-1]
    return np.linspace(1, 1 / train_steps, steps + 1)[:-1]


def _factor(solver: str, shift: float, mu: float | None, time_shift: str) -> float:
    """What the levels are shifted by."""
    given, name = (shift, "shift") if mu is None else (mu, "mu")
    if mu is not None and time_shift == EXPONENTIAL:
        if not abs(mu) < 700:
            raise UsageError(f"{solver}: mu is {mu:g}; the shift it stands for is not finite")
        return math.exp(mu)
    if not 0 < given < math.inf:
        raise UsageError(f"{solver}: {name} is {given:g}; it must be positive (1 leaves the grid as it is)")
    return given


def _descending(solver: str, given: Array, steps: int) -> Array:
    if given.ndim != 1 or len(given) != steps:
        raise UsageError(f"{solver}: {steps} steps were asked for with {given.size} sigmas; give one sigma a step")
    if not (np.diff(given) < 0).all() or not 0 < given[-1] <= given[0] <= 1:
        raise UsageError(f"{solver}: sigmas must descend, from at most 1 to more than 0 (the final 0 is added)")
    return given
