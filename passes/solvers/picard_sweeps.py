"""How many sweeps Picard sampling will take, before a network has been asked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.table import SolverTable

PICTURES, PIXELS = 4, 64
MEAN, DEVIATION = 0.5, 0.05


def expected_sweeps(table: SolverTable, window: int, tolerance: float, acceleration: int = 0) -> int:
    """Count the sweeps that `picard` takes with ``table`` on a problem whose best network has a closed form.

    Its pixels are independent and nearly one of two values, 0.5 and -0.5. The scenes models took 13 and 14 sweeps where
    this says 12 and 14 (50 steps, window 8, tolerance 0.1). `UsageError` where the table does not know its levels.
    """
    last = int(np.argmin(table.level[:-1].any(axis=1)))
    if not table.level[:-1].any(axis=1).all() or not (table.cf * table.clean[:, 1]).all() or table.network.any():
        raise UsageError(
            f"picard: row {last} of this solver does not say what its network sees or answers, so its sweeps cannot be "
            "told before the run; take another solver, or force the run"
        )
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=(PICTURES, PIXELS)) for _ in range(1 + len(table.noisy))]
    rows = {float(time): i for i, time in reversed(list(enumerate(table.time)))}

    def denoise(y: npt.NDArray[np.float64], t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        said = np.empty_like(y)
        for time in set(np.broadcast_to(t, len(y)).tolist()):
            here, i = t == time, rows[time]
            said[here] = _answer(table, i, y[here])
        return said

    found = picard(
        denoise, table, noise[0], window=window, tolerance=tolerance, noise=noise[1:], acceleration=acceleration
    )
    return found.sweeps


def _answer(table: SolverTable, row: int, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The posterior mean of x0 given y = a x0 + b eps, in the network's terms."""
    a, b = table.level[row]
    variance = (a * DEVIATION) ** 2 + b**2
    centre = MEAN * np.tanh(a * MEAN * y / variance)
    x0 = centre + a * DEVIATION**2 / variance * (y - a * centre)
    integrand = (x0 - table.clean[row, 0] * y) / table.clean[row, 1]
    return np.asarray((integrand - table.cy[row] * y) / table.cf[row])
