"""DDIM (Song et al., 2010.02502) with any eta: deterministic at 0, DDPM's posterior variance at 1.

x' = sqrt(ab') x0 + sqrt(1 - ab' - s^2) eps + s z,    s^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab')
"""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.schedule import Array, alpha_bar, ddim_times, to_x0
from hasten.passes.solvers.table import SolverTable, one_latent


def ddim(
    steps: int,
    *,
    schedule: str | Array = "scaled_linear",
    prediction: str = "epsilon",
    spacing: str = "leading",
    offset: int = 0,
    eta: float = 0.0,
    set_alpha_to_one: bool = True,
    compat: str | None = "diffusers",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    train_steps: int = 1000,
) -> SolverTable:
    """Build the DDIM table of ``steps`` evaluations over one latent; ``m`` is the predicted x0.

    ``schedule`` is a name (see `schedule.betas`, with ``beta_start``, ``beta_end``, ``train_steps``) or an array of
    alpha_bar. With ``compat="diffusers"`` a step goes from t to ``t - T // steps`` whatever the grid, as DDIMScheduler
    does: that is not the next time of the grid for ``linspace``, nor for ``trailing`` where ``steps`` does not divide
    T. ``compat=None`` goes to the next time. Past the end, alpha_bar is 1, or alpha_bar[0] unless ``set_alpha_to_one``.
    DDIMScheduler clips x0 by default (``clip_sample``), which no linear table can; Stable Diffusion's configuration
    does not.
    """
    if compat not in (None, "diffusers"):
        raise UsageError(f"ddim: compat is 'diffusers' or None, not {compat!r}")
    if eta < 0:
        raise UsageError(f"ddim: eta is {eta:g}; it scales a standard deviation and cannot be negative")
    bars = alpha_bar(schedule, train_steps, start=beta_start, end=beta_end) if isinstance(schedule, str) else schedule
    times = ddim_times(spacing, steps, len(bars), offset=offset)
    targets = times - len(bars) // steps if compat == "diffusers" else np.append(times[1:], -1)
    final = 1.0 if set_alpha_to_one else bars[0]
    here, there = bars[times], np.where(targets >= 0, bars[np.maximum(targets, 0)], final)

    signal, noise = np.sqrt(here), np.sqrt(1 - here)
    variance = eta**2 * (1 - there) / (1 - here) * (1 - here / there)
    if (variance > 1 - there).any():
        raise UsageError(f"ddim: eta {eta:g} asks for more noise than a step may add on this grid; lower eta")
    direction = np.sqrt(1 - there - variance)
    cy, cf = to_x0(prediction, signal, noise)
    # With x0 as the integrated quantity, eps = (x - signal x0) / noise.
    return one_latent(
        time=times,
        a=direction / noise,
        b=np.sqrt(there) - direction * signal / noise,
        c=np.sqrt(variance),
        cy=cy,
        cf=cf,
    )
