"""`Grid`: the noise levels that a sampler visits, and the time that the network is told at each.

Builders take a grid and nothing else about the schedule, so any solver runs on any grid: a diffusion process's times,
Karras levels, rectified flow, or levels that the caller chose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.prediction import Array


@dataclass(frozen=True, eq=False)
class Grid:
    """N levels and the end: ``y = signal x0 + noise eps`` at each; float64.

    ``time`` (N,) is what the network is told, ``signal`` and ``noise`` (N + 1,) end with the level of the result.
    ``path`` is ``diffusion`` (signal^2 + noise^2 = 1) or ``flow`` (signal + noise = 1). The network's first input is
    ``init`` times unit noise. A sampler that starts late, from a picture with noise added, begins at level ``first``:
    a method that remembers earlier values starts anew there.
    """

    time: Array
    signal: Array
    noise: Array
    path: str = "diffusion"
    init: float = 1.0
    first: int = 0

    def __post_init__(self) -> None:
        for name in ("time", "signal", "noise"):
            array = np.array(getattr(self, name), np.float64)
            if not np.isfinite(array).all():
                raise UsageError(f"grid: {name} has a value that is not finite; give finite times and noise levels")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        n = len(self.time)
        if not n:
            raise UsageError("grid: no time was given; at least 1 is needed")
        if self.signal.shape != (n + 1,) or self.noise.shape != (n + 1,):
            raise UsageError(
                f"grid: {n} times need {n + 1} signal and noise levels, the end's too; "
                f"{self.signal.size} and {self.noise.size} were given"
            )
        if (self.signal < 0).any() or (self.noise < 0).any():
            raise UsageError("grid: a signal or noise level is negative; levels go from 0 up")
        # b / a falls where b_i a_j > b_j a_i, also where a is zero
        falls = self.noise[:-1] * self.signal[1:] - self.noise[1:] * self.signal[:-1]
        if (falls[:-1] <= 0).any() or falls[-1] < 0:
            at = int(np.argmax(np.append(falls[:-1] <= 0, falls[-1] < 0)))
            raise UsageError(
                f"grid: the noise does not fall from level {at} to level {at + 1}; "
                "times and levels must descend, each given once"
            )

    def __len__(self) -> int:
        """Count the levels with an evaluation, N."""
        return len(self.time)

    @property
    def log_snr(self) -> Array:
        """Half the logarithm of the signal-to-noise ratio, ln(a / b), (N + 1,); infinite where a level is zero."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.signal) - np.log(self.noise))

    @property
    def line(self) -> tuple[Array, Array, str]:
        """``(scale, coordinate, slope)``: ``d (x / scale) / d coordinate`` is the quantity named ``slope``.

        ``x / a`` over ``b / a`` with slope eps for diffusion (Karras et al., 2206.00364), x over b with the velocity
        ``eps - x0`` for flow. Finite where the signal is not zero, or the path is flow.
        """
        if self.path == "flow":
            return np.ones_like(self.signal), self.noise, "velocity"
        self.refuse_zero_signal("integrates over the ratio of noise to signal")
        return self.signal, self.noise / self.signal, "eps"

    def with_unscaled_end(self) -> Grid:
        """The same grid whose result is x / a: no network sees it, so a method along `line` leaves it as it is.

        That matters where the end has noise alone; the result is then ``x0 + b / a eps``.
        """
        if self.path == "flow" or self.signal[-1] == 0:
            return self
        signal, noise = self.signal.copy(), self.noise.copy()
        signal[-1], noise[-1] = 1.0, noise[-1] / signal[-1]
        return replace(self, signal=signal, noise=noise)

    @property
    def ends_at_zero(self) -> bool:
        """Whether the end has no noise: its log-SNR is infinite."""
        return bool(self.noise[-1] == 0)

    @property
    def stays(self) -> bool:
        """Whether the end repeats the last level."""
        return bool(self.noise[-1] == self.noise[-2] and self.signal[-1] == self.signal[-2])

    def refuse_zero_signal(self, why: str) -> None:
        """Stop a solver that needs some signal at every level."""
        if (self.signal == 0).any():
            raise UsageError(
                f"the grid starts where the signal level is zero, and this solver {why}; start a little below, take "
                "ddim, or a schedule that is not rescaled to zero terminal SNR"
            )


def variance_preserving(ratios: Array) -> tuple[Array, Array]:
    """Signal and noise levels with a^2 + b^2 = 1 from the ratios b / a."""
    signal = 1 / np.sqrt(1 + np.square(ratios))
    return signal, ratios * signal
