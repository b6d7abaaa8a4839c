"""DPM-Solver (Lu et al., 2206.00927) and DPM-Solver++ (2211.01095), multistep and singlestep, ODE and SDE.

Between two levels with log-SNR l_s < l_t, h = l_t - l_s, the solution is an exponential integral of what the network
says. In the data form (++), of x0; in the noise form, of eps::

    x_t = b_t / b_s x_s + a_t  int e^-(l_t - l) x0(l) dl,        x_t = a_t / a_s x_s - b_t int e^(l_t - l) eps(l) dl

and with m(l) = m + (l - l_s) m' + (l - l_s)^2 / 2 m'' the integrals are the ``phi`` functions. The SDE forms hold twice
the integral and fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import UsageError, nearest
from hasten.passes.solvers import defects
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.multistep import Update, multistep
from hasten.passes.solvers.phi import phi
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.table import SolverTable

FORMS = ("data", "noise", "sde-data", "sde-noise")
"""diffusers calls them dpmsolver++, dpmsolver, sde-dpmsolver++ and sde-dpmsolver."""
SLOPES = ("midpoint", "heun")
"""How order 2 weighs the first derivative: half the weight of the value, or its own integral."""
FEW_STEPS = 15
"""With fewer steps the last ones are of lower order, which is more stable."""


@dataclass(frozen=True)
class Interval:
    """From level ``start`` to level ``stop`` of a grid, in one of the `FORMS`."""

    grid: Grid
    start: int
    stop: int
    form: str

    @property
    def h(self) -> float:
        """The growth of the log-SNR; infinite where the end has no noise."""
        return float(self.grid.log_snr[self.stop] - self.grid.log_snr[self.start])

    @property
    def carry(self) -> float:
        """The factor of x."""
        levels = self.grid.noise if self.form.endswith("data") else self.grid.signal
        ratio = float(levels[self.stop] / levels[self.start])
        return ratio * math.exp(-self.h) if self.form == "sde-data" else ratio

    @property
    def kick(self) -> float:
        """The standard deviation of the fresh noise."""
        b = float(self.grid.noise[self.stop])
        if self.form == "sde-data":
            return b * math.sqrt(-math.expm1(-2 * self.h))
        return b * math.sqrt(math.expm1(2 * self.h)) if self.form == "sde-noise" else 0.0

    def weight(self, k: int) -> float:
        """Weigh the (k - 1)-th derivative, which is taken in units of h."""
        speed = {"data": -1, "noise": 1, "sde-data": -2, "sde-noise": 1}[self.form]
        factor = 2 if self.form.startswith("sde") else 1
        scale = self.grid.signal[self.stop] if self.form.endswith("data") else -self.grid.noise[self.stop]
        z = speed * self.h
        if k == 1:  # h phi_1(z), which is finite where h is not
            return float(scale) * factor / speed * math.expm1(z)
        return float(scale) * factor * self.h * phi(k, z)

    def gains(self, nodes: Sequence[int], slope: str, second: float = 1.0) -> Array:
        """Weigh the values at ``nodes``, the first of which is the start: an order for each node.

        Order 3 weighs the second derivative with ``second`` times its integral.
        """
        order = len(nodes)
        value = np.eye(order)[0] * self.weight(1)
        if order == 1:
            return value
        r = (self.grid.log_snr[list(nodes)] - self.grid.log_snr[self.start]) / self.h
        if order == 2:
            slope_weight = self.weight(2) if slope == "heun" else self.weight(1) / 2
            return value + slope_weight * np.array([-1, 1]) / r[1]
        first, other = np.array([-1, 1, 0]) / r[1], np.array([-1, 0, 1]) / r[2]
        derivative = (r[2] * first - r[1] * other) / (r[2] - r[1])
        divided = (other - first) / (r[2] - r[1])  # the second divided difference is half the second derivative
        return np.asarray(value + self.weight(2) * derivative + self.weight(3) * second * 2 * divided)


def dpm_solver(
    grid: Grid,
    *,
    prediction: str = "epsilon",
    order: int = 2,
    form: str = "data",
    slope: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    compat: str | None = "diffusers",
) -> SolverTable:
    """Build the multistep solver of ``order`` 1 to 3: one evaluation a level.

    It starts with order 1, and ends with it where the end has no noise, with ``euler_at_final``, or with fewer than 15
    steps and ``lower_order_final``, which also limits the last but one to order 2. ``form`` and ``slope``: see `FORMS`
    and `SLOPES`. Order 3: `defects.HALVED_SECOND_DIFFERENCE`, and for the SDE forms `SDE_SECOND_DIFFERENCE_SIGN` and
    `SDE_NOISE_FORM_ORDER_3`.
    """
    check("dpm-solver", order, form, slope, grid)
    n, updates = len(grid), []
    for i in range(grid.first, n):
        p = min(order, i + 1 - grid.first)
        if i == n - 1 and (euler_at_final or grid.ends_at_zero or (lower_order_final and n < FEW_STEPS)):
            p = 1
        elif i == n - 2 and lower_order_final and n < FEW_STEPS:
            p = min(p, 2)
        if i == n - 1 and grid.stays:
            updates.append(Update(1.0, np.zeros(p)))
            continue
        interval = Interval(grid, i, i + 1, form)
        second = _second(interval, compat) if p == 3 else 1.0
        updates.append(Update(interval.carry, interval.gains(range(i, i - p, -1), slope, second), interval.kick))
    defects.check(compat, solver="dpm-solver")
    return multistep(grid, updates, prediction=prediction, quantity="x0" if form.endswith("data") else "eps")


def _second(interval: Interval, compat: str | None) -> float:
    """How much of the second derivative's integral diffusers' multistep solvers take."""
    if interval.form == "sde-noise" and defects.follows(compat, defects.SDE_NOISE_FORM_ORDER_3, solver="dpm-solver"):
        raise UsageError(
            "dpm-solver: diffusers has no third-order update in the sde-noise form; "
            "take order=2, form=sde-data, or compat=none for the published one"
        )
    if interval.form == "sde-data" and defects.follows(compat, defects.SDE_SECOND_DIFFERENCE_SIGN, solver="dpm-solver"):
        return sde_sign_defect(interval) / 2
    return 0.5 if defects.follows(compat, defects.HALVED_SECOND_DIFFERENCE, solver="dpm-solver") else 1.0


def sde_sign_defect(interval: Interval) -> float:
    """Return the wrong weight of the second derivative over the right one: the integral minus one."""
    right = interval.weight(3)
    return (right - float(interval.grid.signal[interval.stop])) / right


def check(solver: str, order: int, form: str, slope: str, grid: Grid) -> None:
    """Refuse options that name nothing, and grids that a form cannot reach the end of."""
    for name, value, choices in (("form", form, FORMS), ("slope", slope, SLOPES)):
        if value not in choices:
            raise UsageError(f"{solver}: {name} {value!r} is none of {', '.join(choices)}.{nearest(value, choices)}")
    if not 1 <= order <= 3:
        raise UsageError(f"{solver}: order is {order}; it goes from 1 to 3")
    grid.refuse_zero_signal("integrates over the log-SNR, which is infinite there")
    if form.endswith("noise") and grid.ends_at_zero:
        raise UsageError(
            f"{solver}: the {form} form cannot reach a zero noise level, where its weights are infinite; "
            "end at sigma_min or take the data form"
        )
