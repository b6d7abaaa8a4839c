"""Splitting for sampling with a guide (Wizadwongsa & Suwajanakorn, 2301.11558): LTSP and STSP.

With classifier guidance of weight w the solution's slope along ``x / a`` over ``r = b / a`` is the sum of two: eps, and
``g = -w b grad_x log p(c | x)``. The first is smooth and takes a multistep method, the second is not and takes Euler's.
Lie-Trotter splitting (LTSP) takes a step of one and then of the other, Strang splitting (STSP) half a step of g, a step
of eps, and half a step of g.
"""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.multistep import clean
from hasten.passes.solvers.pndm import ADAMS_BASHFORTH
from hasten.passes.solvers.prediction import Array, convert
from hasten.passes.solvers.table import SolverTable

DENOISER, GUIDE = 0, 1
"""Which network a row evaluates: the guide returns ``grad_x log p(c | x)`` at what the denoiser would see."""


def ltsp(grid: Grid, *, prediction: str = "epsilon", order: int = 4, weight: float = 1.0) -> SolverTable:
    """Build Lie-Trotter splitting: the denoiser and then the guide, once each a step; ``order`` latents.

    ``order`` 1 to 4 is that of Adams-Bashforth in the step's number, which grows from 1. The method is of order 1.
    Where the end has no noise the guide has no say, and its row is left out.
    """
    return _split("ltsp", grid, prediction, order, weight, before=0.0, after=1.0)


def stsp(grid: Grid, *, prediction: str = "epsilon", order: int = 4, weight: float = 1.0) -> SolverTable:
    """Build Strang splitting: the guide, the denoiser and the guide again in every step; otherwise as `ltsp`."""
    return _split("stsp", grid, prediction, order, weight, before=0.5, after=0.5)


def _split(
    solver: str, grid: Grid, prediction: str, order: int, weight: float, before: float, after: float
) -> SolverTable:
    """Build a step of ``before`` parts of g, all of eps, ``after`` parts of g."""
    if not 1 <= order <= 4:
        raise UsageError(f"{solver}: order is {order}; it goes from 1 to 4")
    if grid.path != "diffusion":
        raise UsageError(f"{solver}: it is for diffusion; guide a flow's velocity inside its network instead")
    grid.refuse_zero_signal("integrates over the ratio of noise to signal")
    signal, noise = grid.signal, grid.noise
    ratio = noise / signal
    times = np.append(grid.time, 0.0)
    rows = _Rows(order)
    for i in range(len(grid)):
        length = float(ratio[i + 1] - ratio[i])
        # x = a (x / a), so a part of g moves x by a times its share
        rows.guide(i, times, -weight * before * length * signal[i] * noise[i])
        mixture = np.array(ADAMS_BASHFORTH[min(i + 1, order) - 1])
        rows.denoise(i, times, float(signal[i + 1] / signal[i]), signal[i + 1] * length * mixture)
        rows.guide(i + 1, times, -weight * after * length * signal[i + 1] * noise[i + 1])
    return rows.table(grid, prediction)


class _Rows:
    """Rows of a table in the making; latents: x, then earlier values of eps."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.a: list[Array] = []
        self.b: list[Array] = []
        self.level: list[int] = []
        self.time: list[float] = []
        self.network: list[int] = []

    def guide(self, level: int, times: Array, gain: float) -> None:
        """Move x by ``gain`` times the guide's gradient; no row where that is nothing."""
        if gain:
            b = np.zeros(self.width)
            b[0] = gain
            self._add(level, times, np.eye(self.width), b, GUIDE)

    def denoise(self, level: int, times: Array, carry: float, gains: Array) -> None:
        """Take a multistep step."""
        a, b = np.eye(self.width, k=-1), np.zeros(self.width)
        if self.width > 1:
            a[1], b[1] = 0, 1
        a[0], a[0, 1 : len(gains)], b[0] = 0, gains[1:], gains[0]
        a[0, 0] = carry
        self._add(level, times, a, b, DENOISER)

    def _add(self, level: int, times: Array, a: Array, b: Array, network: int) -> None:
        self.a.append(a)
        self.b.append(b)
        self.level.append(level)
        self.time.append(float(times[level]))
        self.network.append(network)

    def table(self, grid: Grid, prediction: str) -> SolverTable:
        """The finished table; a guide's output is taken as it is, and says nothing about x0."""
        guided = np.array(self.network) == GUIDE
        levels = [*self.level, len(grid)]
        signal, noise = grid.signal[self.level], grid.noise[self.level]
        cy, cf = (np.where(guided, plain, c) for plain, c in zip((0, 1), _eps(prediction, signal, noise), strict=True))
        first = np.eye(self.width)[0]
        return SolverTable(
            time=np.array(self.time),
            input=np.tile(first, (len(self.time), 1)),
            A=np.array(self.a),
            B=np.array(self.b),
            C=np.zeros((len(self.time), self.width)),
            cy=cy,
            cf=cf,
            output=first,
            init=grid.init,
            clean=np.where(guided[:, None], 0.0, clean("eps", signal, noise)),
            level=np.stack([grid.signal[levels], grid.noise[levels]], 1),
            network=np.array(self.network),
        )


def _eps(prediction: str, signal: Array, noise: Array) -> tuple[Array, Array]:
    """Convert to eps, also at a level without noise, where only a guide's row can be."""
    return convert(prediction, "eps", signal, np.where(noise == 0, 1.0, noise))
