"""PNDM and PLMS (Liu et al., 2202.09778): Adams-Bashforth in the step's number, along DDIM's transfer.

``x_t = T(x_s, e') = a_t / a_s x_s + (b_t - b_s a_t / a_s) e'`` with e' a mixture of the newest eps and up to three
earlier ones. PLMS starts with a step of improved Euler; PNDM with three of Runge-Kutta, of four evaluations each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.multistep import clean
from hasten.passes.solvers.prediction import Array, convert
from hasten.passes.solvers.schedule import check_times, ddim_times
from hasten.passes.solvers.table import SolverTable

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest value and of those before it, by their number."""


def plms(
    steps: int,
    bars: Array,
    *,
    prediction: str = "epsilon",
    spacing: str = "leading",
    offset: int = 0,
    times: Sequence[int] | None = None,
    set_alpha_to_one: bool = False,
    compat: str | None = "diffusers",
    first: int = 0,
) -> SolverTable:
    """Build PLMS: ``steps`` + 1 evaluations, since the first step is corrected once; 4 latents.

    ``bars`` (T,) is alpha_bar at the training times; ``times`` are the caller's own, descending. Past the end alpha_bar
    is bars[0], or 1 with ``set_alpha_to_one``. `defects.FIXED_STRIDE`, `defects.MIXED_VELOCITIES`.

    The rows from ``first`` on, at the times that they have anyway, are a run from a picture. There is then no time to
    spare for the correction, so that the order grows from 1; a second row at the same time, where ``first`` is 1,
    starts over. `defects.LATE_CORRECTION`.
    """
    grid = _times("plms", steps, bars, spacing, offset, times)
    walk = _Walk(
        "plms", grid, bars, prediction, set_alpha_to_one, compat, width=min(4, steps), fixed_stride=times is None
    )
    visited = [0, 1, *range(1, steps)][first:] if steps > 1 else [0]
    corrects = not first or (walk.fixed_stride and defects.follows(compat, defects.LATE_CORRECTION, solver="plms"))
    for row, i in enumerate(visited):
        if corrects and row == 1:
            walk.correct(grid[visited[0]], walk.target(visited[0]), grid[i])
        elif not corrects and i in visited[row + 1 :]:
            walk.stay(grid[i])
        else:
            walk.adams_bashforth(grid[i], walk.target(i), min(walk.known + 1, 4))
    return walk.table()


def pndm(
    steps: int,
    bars: Array,
    *,
    prediction: str = "epsilon",
    spacing: str = "leading",
    offset: int = 0,
    times: Sequence[int] | None = None,
    set_alpha_to_one: bool = False,
    compat: str | None = "diffusers",
) -> SolverTable:
    """Build PNDM: three steps of Runge-Kutta, then PLMS; ``steps`` + 9 evaluations, 6 latents. Options as for `plms`.

    Between two times of the grid, Runge-Kutta evaluates in the middle: the training times must leave room for it.
    """
    grid = _times("pndm", steps, bars, spacing, offset, times)
    if steps < 4:
        raise UsageError(
            f"pndm: {steps} steps were asked for; its three Runge-Kutta steps and one more need at least 4"
        )
    if (np.diff(grid[:4]) > -2).any():
        raise UsageError(f"pndm: {steps} steps leave no time between those of the grid for Runge-Kutta; take fewer")
    walk = _Walk("pndm", grid, bars, prediction, set_alpha_to_one, compat, width=6, fixed_stride=times is None)
    for i in range(3):
        walk.runge_kutta(int(grid[i]), int(grid[i + 1]))
    for i in range(3, steps):
        walk.adams_bashforth(grid[i], walk.target(i), 4)
    return walk.table()


def _times(
    solver: str, steps: int, bars: Array, spacing: str, offset: int, times: Sequence[int] | None
) -> tuple[int, ...]:
    grid = ddim_times(spacing, steps, len(bars), offset=offset) if times is None else check_times(times, steps, bars)
    if not len(grid):
        raise UsageError(f"{solver}: no time was given; at least 1 is needed")
    return tuple(int(t) for t in grid)


class _Walk:
    """Rows of a table in the making. Latents: x, then earlier values, newest first; at the end two for Runge-Kutta."""

    def __init__(
        self,
        solver: str,
        grid: Sequence[int],
        bars: Array,
        prediction: str,
        set_alpha_to_one: bool,
        compat: str | None,
        width: int,
        fixed_stride: bool,
    ) -> None:
        convert(prediction, "eps", bars[list(grid)] ** 0.5, (1 - bars[list(grid)]) ** 0.5)  # refuses what it cannot
        if not bars[grid[0]]:
            raise UsageError(
                f"{solver}: the grid starts where the signal level is zero, and its steps divide by that level; "
                "start a little below, take ddim, or a schedule that is not rescaled to zero terminal SNR"
            )
        self.grid, self.bars, self.prediction, self.width = grid, bars, prediction, width
        self.final = 1.0 if set_alpha_to_one else float(bars[0])
        self.fixed_stride = fixed_stride and defects.follows(compat, defects.FIXED_STRIDE, solver=solver)
        mixes = defects.follows(compat, defects.MIXED_VELOCITIES, solver=solver)
        self.mixes_velocities = mixes and prediction == "v_prediction"
        self.stride = len(bars) // len(grid)
        self.memory = min(3, width - 1)
        self.known = 0
        self.time: list[int] = []
        self.a: list[Array] = []
        self.b: list[Array] = []

    def target(self, i: int) -> int:
        """Where the step from the i-th time ends; negative past the last."""
        if self.fixed_stride:
            return self.grid[i] - self.stride
        return self.grid[i + 1] if i + 1 < len(self.grid) else -1

    def transfer(self, source: int, target: int) -> tuple[float, float]:
        """The factors of x and of the mixture; that is of v where velocities are mixed."""
        here, there = float(self.bars[source]), float(self.bars[target]) if target >= 0 else self.final
        carry = math.sqrt(there / here)
        gain = math.sqrt(1 - there) - math.sqrt(1 - here) * carry
        if self.mixes_velocities:  # eps = a v + b x, at the source
            return carry + gain * math.sqrt(1 - here), gain * math.sqrt(here)
        return carry, gain

    def row(self, time: int, a: Array, b: Array, *, push: bool) -> None:
        """Add a row; ``push`` makes its value the newest of the earlier ones."""
        if push and self.memory:
            b[1] = 1
        self.known += push
        for j in range(1, 1 + self.memory):
            if not push:
                a[j, j] = 1
            elif j > 1:
                a[j, j - 1] = 1
        self.time.append(time)
        self.a.append(a)
        self.b.append(b)

    def blank(self) -> tuple[Array, Array]:
        return np.zeros((self.width, self.width)), np.zeros(self.width)

    def adams_bashforth(self, source: int, target: int, count: int) -> None:
        """Step with a mixture of ``count`` values."""
        a, b = self.blank()
        carry, gain = self.transfer(source, target)
        newest, *earlier = ADAMS_BASHFORTH[count - 1]
        a[0, 0], b[0] = carry, gain * newest
        a[0, 1:count] = gain * np.array(earlier)
        self.row(source, a, b, push=True)

    def stay(self, time: int) -> None:
        """Evaluate, and leave everything as it is."""
        a, b = self.blank()
        a[0, 0] = 1
        self.row(time, a, b, push=False)

    def correct(self, source: int, predicted: int, time: int) -> None:
        """Repeat the first step with the mean of its value and the one at ``time``, from the sample it started from."""
        a, b = self.blank()
        carry, gain = self.transfer(source, predicted)
        again = self.transfer(time + self.stride if self.fixed_stride else source, time)
        # x_1 = carry x_0 + gain e_0 gives x_0 back.
        ratio = again[0] / carry
        a[0, 0], a[0, 1], b[0] = ratio, again[1] / 2 - ratio * gain, again[1] / 2
        self.row(time, a, b, push=False)

    def runge_kutta(self, source: int, target: int) -> None:
        """Step with the classical method of order 4: the beginning, twice the middle, the end, all from one sample."""
        base, total = self.width - 2, self.width - 1
        half = self.stride // 2
        middle = target + half if self.fixed_stride else (source + target) // 2
        first = source - half if self.fixed_stride else middle
        evaluations, targets = (source, middle, middle, target), (first, middle, target, target)
        for stage, (time, aim, share) in enumerate(
            zip(evaluations, targets, (1 / 6, 1 / 3, 1 / 3, 1 / 6), strict=True)
        ):
            a, b = self.blank()
            carry, gain = self.transfer(source, aim)
            a[0, base if stage else 0] = carry
            a[base, base if stage else 0] = 1
            if stage == 3:
                a[0, total], b[0] = gain, gain * share
            else:
                b[0], b[total] = gain, share
                a[total, total] = float(stage > 0)
            self.row(time, a, b, push=stage == 0)

    def table(self) -> SolverTable:
        """The finished table."""
        time = np.array(self.time)
        signal, noise = np.sqrt(self.bars[time]), np.sqrt(1 - self.bars[time])
        if self.mixes_velocities:
            cy, cf = np.zeros(len(time)), np.ones(len(time))
            x0 = np.stack([signal, -noise], 1)
        else:
            cy, cf = convert(self.prediction, "eps", signal, noise)
            x0 = clean("eps", signal, noise)
        first = np.eye(self.width)[0]
        return SolverTable(
            time=time,
            input=np.tile(first, (len(time), 1)),
            A=np.array(self.a),
            B=np.array(self.b),
            C=np.zeros((len(time), self.width)),
            cy=cy,
            cf=cf,
            output=first,
            clean=x0,
            level=np.stack([np.append(signal, self.final**0.5), np.append(noise, (1 - self.final) ** 0.5)], 1),
        )
