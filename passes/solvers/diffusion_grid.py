"""Grids of diffusion processes: which of the training's noise levels a sampler visits, or levels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import UsageError, nearest
from hasten.passes.solvers import defects
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.levels import LEVELS, chosen, time_of
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.schedule import check_times, spaced

ENDS = ("zero", "sigma_min")
"""Where the last step goes: no noise, or the level of training time 0."""
SMALLEST_ALPHA_BAR = 2.0**-24
"""What diffusers' solvers in log-SNR take for an alpha_bar of zero; the smallest positive float16."""


@dataclass(frozen=True)
class Convention:
    """What a family of samplers means by a spacing and by levels.

    ``last``: the lowest point of the grid is a level, not the end. ``whole``: times are whole numbers. ``visited``:
    levels of their own span the visited times, not all of the training's. ``repeats``: such levels end with a
    repetition where the end is sigma_min. ``unit``: the first input is unit noise whatever the spacing.
    """

    last: bool
    whole: bool
    visited: bool
    repeats: bool
    unit: bool


DPM = Convention(last=False, whole=True, visited=False, repeats=False, unit=True)
UNIPC = Convention(last=False, whole=True, visited=False, repeats=True, unit=True)
KARRAS = Convention(last=True, whole=False, visited=True, repeats=False, unit=False)


def diffusion_grid(
    steps: int,
    bars: Array,
    *,
    convention: Convention = DPM,
    spacing: str = "linspace",
    offset: int = 0,
    levels: str = "model",
    end: str = "zero",
    times: Sequence[float] | None = None,
    ratios: Sequence[float] | None = None,
    least_log_snr: float = -np.inf,
    rounding: str | None = None,
    compat: str | None = "diffusers",
) -> Grid:
    """Build the grid of ``steps`` levels on the schedule ``bars`` (T,), alpha_bar at the training times.

    ``levels``: see `LEVELS`. ``times`` or ``ratios`` (noise over signal) are the caller's own, descending, one a step.
    Training times whose log-SNR is below ``least_log_snr`` are left out (diffusers: ``lambda_min_clipped``).
    ``rounding`` of the times told: ``round`` or ``down``. `defects.WHOLE_TIMES`, `defects.REPEATED_END`.
    """
    _check(levels, end, times, ratios)
    model = noise_to_signal(bars)
    repeat = defects.follows(compat, defects.REPEATED_END, solver="grid")
    top = int((-np.log(model) < least_log_snr).sum())

    def visit(count: int) -> tuple[Array, Array]:
        if ratios is not None:
            return time_of(_descending(ratios, steps), model), _descending(ratios, steps)
        if times is not None:
            told = check_times(times, steps, bars)
        else:
            told = spaced(
                spacing, count, len(bars), offset=offset, last=convention.last, whole=convention.whole, top=top
            )
        here = np.interp(told, np.arange(len(model)), model)
        if levels == "model":
            return told, here
        span = here if convention.visited else model[::-1]
        here = chosen(levels, float(span[0]), float(span[-1]), count)
        return time_of(here, model), here

    told, here = visit(steps)
    last = 0.0 if end == "zero" else float(model[0])
    own = levels != "model"
    if last and (here[-1] <= last * (1 + 1e-9) or (own and convention.repeats)):
        if repeat:
            last = float(here[-1])
        else:  # one level more, and the lowest is the end
            told, here = visit(steps + 1)
            told, here, last = told[:-1], here[:-1], float(here[-1])
    if own and convention.whole and defects.follows(compat, defects.WHOLE_TIMES, solver="grid"):
        rounding = rounding or ("round" if levels in ("karras", "lu") else "down")
        told = np.round(told) if rounding == "round" else np.floor(told)
    signal, noise = variance_preserving(np.append(here, last))
    # Without a unit start the first sample, before it is scaled down for the network, is noise of the first level.
    init = 1.0 if convention.unit or spacing == "leading" else float(noise[0])
    return Grid(told, signal, noise, init=init)


def noise_to_signal(bars: Array) -> Array:
    """Return b / a at every training time, (T,), finite where alpha_bar is zero too."""
    bars = np.where(bars == 0, SMALLEST_ALPHA_BAR, bars)
    return np.asarray(np.sqrt((1 - bars) / bars))


def _descending(ratios: Sequence[float], steps: int) -> Array:
    given = np.asarray(ratios, np.float64)
    if given.ndim != 1 or len(given) != steps:
        raise UsageError(f"{steps} steps were asked for with {given.size} sigmas; give one sigma a step")
    if not np.isfinite(given).all() or (np.diff(given) >= 0).any() or given[-1] <= 0:
        raise UsageError("sigmas must be finite and descend, to more than 0 (the end is added)")
    return given


def _check(levels: str, end: str, times: Sequence[float] | None, ratios: Sequence[float] | None) -> None:
    for name, value, choices in (("levels", levels, LEVELS), ("end", end, ENDS)):
        if value not in choices:
            raise UsageError(f"grid: {name} {value!r} is none of {', '.join(choices)}.{nearest(value, choices)}")
    if times is not None and ratios is not None:
        raise UsageError("grid: both times and sigmas were given; give one of them")
    if levels != "model" and (times is not None or ratios is not None):
        given = "times" if times is not None else "sigmas"
        raise UsageError(f"grid: {levels} levels were asked for and {given} were given; leave one of them out")
