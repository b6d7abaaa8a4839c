"""DEIS (Zhang & Chen, 2204.13902): eps as a polynomial in the logarithm of the noise-to-signal ratio rho = b / a.

``x_t / a_t = x_s / a_s + sum_j C_j eps_j`` with ``C_j`` the exact integral of Lagrange's polynomial over rho.
"""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.dpm_solver import FEW_STEPS
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.lagrange import coefficients
from hasten.passes.solvers.multistep import Update, multistep
from hasten.passes.solvers.phi import phi
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.table import SolverTable


def deis(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    order: int = 2,
    lower_order_final: bool = True,
    compat: str | None = "diffusers",
) -> SolverTable:
    """Build the multistep solver of ``order`` 1 to 3: one evaluation a level, ``order`` latents.

    It starts with order 1; with ``lower_order_final`` and fewer than 15 steps it also ends with 2 and 1. The end must
    have some noise: the logarithm of rho is infinite otherwise.
    """
    defects.check(compat, solver="deis")
    if not 1 <= order <= 3:
        raise UsageError(f"deis: order is {order}; it goes from 1 to 3")
    grid.refuse_zero_signal("integrates over the ratio of noise to signal")
    if grid.ends_at_zero:
        raise UsageError(
            "deis: its polynomials are in the logarithm of the noise level, which is infinite at a zero end; "
            "end at sigma_min"
        )
    n, updates = len(grid), []
    for i in range(grid.first, n):
        p = min(order, i + 1 - grid.first)
        if lower_order_final and n < FEW_STEPS and i >= n - 2:
            p = min(p, n - i)
        updates.append(
            Update(
                float(grid.signal[i + 1] / grid.signal[i]),
                grid.signal[i + 1] * integrals(-grid.log_snr[i - p + 1 : i + 1][::-1], float(-grid.log_snr[i + 1])),
            )
        )
    return multistep(grid, updates, prediction=prediction, quantity="eps")


def integrals(logs: Array, target: float) -> Array:
    """Integrate Lagrange's polynomials on ``logs`` over rho, from the first of them to ``target``, all as ln rho.

    With u = ln rho - ln rho_s and h its end, ``int rho u^d du = rho_t h^(d+1) d! phi_{d+1}(-h)``.
    """
    h = target - float(logs[0])
    factorial = (1.0, 1.0, 2.0)
    moments = [np.exp(target) * h ** (d + 1) * factorial[d] * phi(d + 1, -h) for d in range(len(logs))]
    return coefficients(logs - logs[0]) @ np.array(moments)
