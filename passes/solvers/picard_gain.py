"""Whether Picard sampling pays, from what a call of the network costs on more rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.table import SolverTable


@dataclass(frozen=True)
class Gain:
    """Seconds of the plain loop's calls and of Picard's, the network alone."""

    plain: float
    picard: float

    @property
    def factor(self) -> float:
        """How many times as fast Picard is; below 1 it is a loss."""
        return self.plain / self.picard

    @property
    def pays(self) -> bool:
        return self.factor > 1

    def __str__(self) -> str:
        return f"{self.picard:.3g} s instead of {self.plain:.3g} s, {self.factor:.2f} times as fast"


def predicted_gain(
    batch_seconds: Mapping[int, float], table: SolverTable, window: int, sweeps: int, *, force: bool = False
) -> Gain:
    """Predict the gain of ``sweeps`` sweeps over ``window`` rows against ``table`` in the plain loop.

    ``batch_seconds`` maps rows in a call (each a whole batch of samples) to the measured seconds of the call: of 1 row,
    of ``window`` rows or some on either side, between which it is interpolated. Every sweep counts as full, which the
    last few are not. `UsageError` with the reason where it is a loss, unless ``force``.
    """
    window = min(window, len(table))
    if window < 1 or sweeps < 1:
        raise UsageError(f"picard: {sweeps} sweeps over {window} rows are no run; both are at least 1")
    for rows, seconds in batch_seconds.items():
        if rows < 1 or not 0 < seconds < math.inf:
            raise UsageError(f"picard: a call on {rows} rows was measured at {seconds:g} s; both must be positive")
    sizes = sorted(batch_seconds)
    if 1 not in batch_seconds or sizes[-1] < window:
        raise UsageError(
            f"picard: calls were measured on {', '.join(map(str, sizes)) or 'no'} rows; 1 row and at least {window} "
            "rows, the window, are needed"
        )
    sweep = float(np.interp(window, sizes, [batch_seconds[size] for size in sizes]))
    gain = Gain(plain=len(table) * batch_seconds[1], picard=sweeps * sweep)
    if gain.factor < 1 and not force:
        raise UsageError(
            f"picard: {sweeps} sweeps over {window} rows take {sweeps} x {sweep:.3g} s and the plain loop "
            f"{len(table)} x {batch_seconds[1]:.3g} s, so it would be {gain.factor:.2f} times as fast; it pays below "
            f"{gain.plain / sweep:.1f} sweeps, or with more devices (with force it runs all the same)"
        )
    return gain
