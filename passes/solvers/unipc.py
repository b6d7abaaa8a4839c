"""UniPC (Zhao et al., 2302.04867): a predictor, and a corrector that costs no evaluation.

With z = -h in the data form and +h in the noise form, nodes r_k = (l_k - l_s) / h, and B(h) = z (bh1) or e^z - 1 (bh2),
the weights rho solve ``sum_k r_k^(j-1) rho_k = j! z phi_{j+1}(z) / B`` for j = 1 .. p, and::

    x_t = c x_s - g (e^z - 1) m_s - g B sum_k rho_k (m_k - m_s) / r_k

The corrector also knows the value at the target, r = 1, once the network has been evaluated there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hasten.errors import UsageError, nearest
from hasten.passes.solvers import defects
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.multistep import Update, multistep
from hasten.passes.solvers.phi import phi
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.table import SolverTable

VARIANTS = ("bh1", "bh2")


def unipc(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    order: int = 2,
    variant: str = "bh2",
    form: str = "data",
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] | None = None,
    compat: str | None = "diffusers",
) -> SolverTable:
    """Build the predictor-corrector of ``order`` 1 to 3: one evaluation a level, p + 1 latents.

    With ``lower_order_final`` the last steps are of order 3, 2, 1. The corrector leaves the steps in
    ``disable_corrector`` (numbered by the evaluation before them) alone. `defects.BH1_ZERO_END`.
    """
    check(grid, order, variant, form, lower_order_final, compat)
    n, updates, predictor, used = len(grid), [], np.empty(0), 0
    for i in range(grid.first, n):
        # The sample the network sees was predicted from c_{i-1}; corrector and predictor start from the same c_{i-1},
        # so the corrected one is the predicted one plus the difference of their weights.
        correction = np.zeros(1)
        if i > grid.first and i - 1 not in (disable_corrector or ()):
            correction = gains(grid, i - 1, used, variant, form, corrector=True)
            correction[1 : 1 + used] -= predictor
        p = min(order, i + 1 - grid.first)
        p = min(p, n - i) if lower_order_final else p
        carry = _carry(grid, i, form)
        predictor = gains(grid, i, p, variant, form)
        weights = np.zeros(max(len(correction), p))
        weights[: len(correction)] += carry * correction
        weights[:p] += predictor
        updates.append(Update(carry, weights))
        used = p
    return multistep(grid, updates, prediction=prediction, quantity="x0" if form == "data" else "eps")


def _carry(grid: Grid, s: int, form: str) -> float:
    levels = grid.noise if form == "data" else grid.signal
    return float(levels[s + 1] / levels[s])


def gains(grid: Grid, s: int, p: int, variant: str, form: str, *, corrector: bool = False) -> Array:
    """Weigh the p values at s, s - 1, ...; for the corrector the value at s + 1 comes first, (p + 1,)."""
    g = grid.signal[s + 1] if form == "data" else grid.noise[s + 1]
    h = float(grid.log_snr[s + 1] - grid.log_snr[s])
    if h == 0:
        return np.zeros(p + corrector)
    z = -h if form == "data" else h
    first = -float(g) * math.expm1(z)
    if p == 1 and not corrector:
        return np.array([first])
    r = (grid.log_snr[[s - k for k in range(1, p)]] - grid.log_snr[s]) / h
    if corrector:
        r = np.append(r, 1.0)
    scale = z if variant == "bh1" else math.expm1(z)
    count = len(r)
    if count == 1:
        rho = np.array([0.5])  # the paper's choice where one equation is left
    else:
        powers = np.array([r**j for j in range(count)])
        right = [math.factorial(j) * z * phi(j + 1, z) / scale for j in range(1, count + 1)]
        rho = np.linalg.solve(powers, np.array(right))
    weights = -float(g) * scale * rho / r
    values = np.append(first - weights.sum(), weights)  # at s, the earlier ones, and the target
    return np.append(values[-1], values[:-1]) if corrector else values


def check(grid: Grid, order: int, variant: str, form: str, lower_order_final: bool, compat: str | None) -> None:
    """Refuse options that name nothing, and ends that an order cannot reach."""
    if variant not in VARIANTS:
        raise UsageError(f"unipc: variant {variant!r} is none of {', '.join(VARIANTS)}.{nearest(variant, VARIANTS)}")
    if form not in ("data", "noise"):
        raise UsageError(f"unipc: form {form!r} is none of data, noise.{nearest(form, ('data', 'noise'))}")
    if not 1 <= order <= 3:
        raise UsageError(f"unipc: order is {order}; it goes from 1 to 3")
    grid.refuse_zero_signal("integrates over the log-SNR, which is infinite there")
    bh1 = defects.follows(compat, defects.BH1_ZERO_END, solver="unipc") and variant == "bh1"
    if not grid.ends_at_zero:
        return
    if form == "noise":
        raise UsageError(
            "unipc: the noise form cannot reach a zero noise level, where its weights are infinite; "
            "end at sigma_min or take the data form"
        )
    if not lower_order_final and order > 1 and len(grid) > 1:
        raise UsageError(
            f"unipc: order {order} cannot step to a zero noise level, whose log-SNR is infinite; "
            "end at sigma_min or keep lower_order_final"
        )
    if bh1:
        raise UsageError(
            "unipc: bh1 gives NaN in diffusers where the end has no noise; "
            "take bh2, end at sigma_min, or compat=none for the finite step"
        )
