"""DDIM (Song et al., 2010.02502) with any eta: deterministic at 0, DDPM's posterior variance at 1.

x' = sqrt(ab') x0 + sqrt(1 - ab' - s^2) eps + s z,    s^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.prediction import convert
from hasten.passes.solvers.schedule import Array, alpha_bar, check_times, ddim_times
from hasten.passes.solvers.table import SolverTable, one_latent


def ddim(
    steps: int,
    *,
    schedule: str | Array = "scaled_linear",
    prediction: str = "epsilon",
    spacing: str = "leading",
    offset: int = 0,
    times: Sequence[int] | None = None,
    eta: float = 0.0,
    set_alpha_to_one: bool = True,
    keep_eps: bool = False,
    compat: str | None = "diffusers",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    train_steps: int = 1000,
) -> SolverTable:
    """Build the DDIM table of ``steps`` evaluations over one latent; ``m`` is the predicted x0.

    ``schedule`` is a name (see `schedule.betas`, with ``beta_start``, ``beta_end``, ``train_steps``) or an array of
    alpha_bar. With ``compat="diffusers"`` a step goes from t to ``t - T // steps`` whatever the grid, as DDIMScheduler
    does: that is not the next time of the grid for ``linspace``, nor for ``trailing`` where ``steps`` does not divide
    T (`defects.FIXED_STRIDE`). ``compat=None`` goes to the next time, and so do the caller's own ``times``, descending.
    Past the end, alpha_bar is 1, or alpha_bar[0] unless ``set_alpha_to_one``.

    DDIMScheduler clips x0 by default (``clip_sample``), which no linear table can: it takes a hook of the loop, and
    ``keep_eps``, with which the rest of the step uses the network's eps whatever the hook made of x0 (diffusers without
    ``use_clipped_model_output``). Stable Diffusion's configuration does not clip.
    """
    fixed_stride = defects.follows(compat, defects.FIXED_STRIDE, solver="ddim") and times is None
    if eta < 0:
        raise UsageError(f"ddim: eta is {eta:g}; it scales a standard deviation and cannot be negative")
    bars = alpha_bar(schedule, train_steps, start=beta_start, end=beta_end) if isinstance(schedule, str) else schedule
    if times is None:
        grid = ddim_times(spacing, steps, len(bars), offset=offset)
    else:
        grid = check_times(times, steps, bars).astype(np.int64)
    targets = grid - len(bars) // steps if fixed_stride else np.append(grid[1:], -1)
    final = 1.0 if set_alpha_to_one else bars[0]
    here, there = bars[grid], np.where(targets >= 0, bars[np.maximum(targets, 0)], final)

    signal, noise = np.sqrt(here), np.sqrt(1 - here)
    variance = eta**2 * (1 - there) / (1 - here) * (1 - here / there)
    if (variance > 1 - there).any():
        raise UsageError(f"ddim: eta {eta:g} asks for more noise than a step may add on this grid; lower eta")
    direction = np.sqrt(1 - there - variance)
    cy, cf = convert(prediction, "x0", signal, noise)
    ends = np.append(here, there[-1])
    level = np.stack([np.sqrt(ends), np.sqrt(1 - ends)], 1)
    if keep_eps:
        ey, ef = convert(prediction, "eps", signal, noise)
        table = one_latent(
            time=grid, a=direction * ey, b=np.sqrt(there), c=np.sqrt(variance), cy=cy, cf=cf, level=level
        )
        return replace(table, direct=(direction * ef)[:, None])
    # With x0 as the integrated quantity, eps = (x - signal x0) / noise.
    return one_latent(
        time=grid,
        a=direction / noise,
        b=np.sqrt(there) - direction * signal / noise,
        c=np.sqrt(variance),
        cy=cy,
        cf=cf,
        level=level,
    )
