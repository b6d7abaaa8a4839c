"""MagCache: residuals shrink from call to call by ratios that were measured once; a call reuses while they say little.

Each call multiplies a product by its ratio and adds ``|1 - product|`` to an error. It reuses while the error is within
the threshold and at most ``limit`` calls in a row have; otherwise it computes and both start again. Nothing depends on
data, so the whole run is known beforehand. Ma et al., 2506.09045; Zehong-Ma/MagCache, diffusers' ``mag_cache.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hasten.passes.steps.schedules import Bits, Schedule

Ratios = npt.NDArray[np.float64]

RATIOS: Mapping[str, tuple[float, ...]] = {
    # diffusers, FLUX_MAG_RATIOS, of 28 steps; the first has no predecessor.
    "flux": (
        1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
        1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
        0.89062,
    ),
}  # fmt: skip
"""Published magnitude ratios by model: ``|R_n| / |R_{n-1}|``, token norms averaged."""

INTERPOLATIONS = ("log-cumulative", "nearest")


def interpolate(ratios: tuple[float, ...], steps: int, how: str) -> Ratios:
    """The ratios of a run of another length.

    ``nearest`` takes the ratio at the nearest relative position (the reference and diffusers), which changes the
    product of all of them; ``log-cumulative`` interpolates their running product, which keeps it.
    """
    if steps == len(ratios):
        return np.array(ratios)
    if steps == 1:
        return np.array(ratios[-1:])
    at = np.arange(steps) * (len(ratios) - 1) / (steps - 1)
    if how == "nearest":
        return np.array(ratios)[np.rint(at).astype(int)]
    logs = np.interp(at, np.arange(len(ratios)), np.cumsum(np.log(ratios)))
    return np.exp(np.diff(logs, prepend=0.0))


@dataclass(frozen=True)
class MagCache(Schedule):
    """``retention``: the share of the run that computes at its beginning. ``never``: calls that never reuse.

    ``at_threshold``: whether an error equal to the threshold is a ``reuse`` (FLUX script, diffusers) or a ``compute``
    (Wan script). ``limit`` 0 or a threshold of 0 or less computes all.
    """

    ratios: tuple[float, ...]
    threshold: float
    limit: int = 3
    retention: float = 0.2
    never: tuple[int, ...] = ()
    interpolation: str = "log-cumulative"
    at_threshold: str = "reuse"
    name: ClassVar[str] = "magcache"

    def mask(self, steps: int) -> Bits:
        product, error, reused, bits = 1.0, 0.0, 0, []
        retained = max(1, int(self.retention * steps + 0.5))
        for step, value in enumerate(interpolate(self.ratios, steps, self.interpolation)):
            compute = True
            if step >= retained:
                product *= float(value)
                error += abs(1.0 - product)
                reused += 1
                low = error <= self.threshold if self.at_threshold == "reuse" else error < self.threshold
                full = 0 <= self.limit < reused
                compute = not low or full or self.threshold <= 0 or step in self.never
                if compute:
                    product, error, reused = 1.0, 0.0, 0
            bits.append(compute)
        return np.array(bits, bool)
