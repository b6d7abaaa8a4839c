"""Noise schedules of the training and the grids that samplers choose from them; numpy only, float64.

``alpha_bar[t]`` is the squared signal level a^2 at training time t: a noisy sample is ``y = a x0 + b eps`` with ``b^2 =
1 - a^2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError, nearest

Array = npt.NDArray[np.float64]

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")


def betas(schedule: str, count: int = 1000, *, start: float = 0.0001, end: float = 0.02) -> Array:
    """Return the variances of the forward process, (count,).

    ``linear`` (Ho et al., 2006.11239), ``scaled_linear`` (linear in the square root: Rombach et al., 2112.10752) and
    ``squaredcos_cap_v2`` (Nichol & Dhariwal, 2102.09672; ``start`` and ``end`` do not apply).
    """
    if schedule == "linear":
        return np.linspace(start, end, count)
    if schedule == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if schedule == "squaredcos_cap_v2":
        level = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)
    raise UsageError(
        f"unknown noise schedule {schedule!r}; there are {', '.join(SCHEDULES)}.{nearest(schedule, SCHEDULES)}"
    )


def alpha_bar(schedule: str, count: int = 1000, **ends: float) -> Array:
    """Return the signal level a^2 at every training time, (count,); ``ends`` are those of `betas`."""
    return np.cumprod(1 - betas(schedule, count, **ends), dtype=np.float64)


def snr_shifted(bars: Array, scale: float) -> Array:
    """Divide the signal-to-noise ratio by ``scale`` at every training time (CogVideoX: Yang et al., 2408.06072)."""
    return np.asarray(bars / (scale + (1 - scale) * bars))


def zero_terminal_snr(bars: Array) -> Array:
    """Rescale alpha_bar so that the last time has no signal at all and the first keeps its own (2305.08891)."""
    root = np.sqrt(bars)
    return np.asarray(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def spaced(
    spacing: str, steps: int, count: int, *, offset: int = 0, last: bool = True, whole: bool = True, top: int = 0
) -> Array:
    """Return ``steps`` descending times of 0 .. count - 1 (Lin et al., 2305.08891, table 2).

    Samplers mean different grids by the same words. Without ``last``, leading and linspace have one point more, and the
    lowest is left out: it is the end. linspace is rounded where ``whole``. ``offset`` (diffusers: ``steps_offset``)
    shifts the leading grid only. ``top`` times at the noisy end are left out.
    """
    if not 1 <= steps <= count:
        raise UsageError(f"{steps} sampling steps were asked for; the schedule has times for 1 to {count}")
    points, most = steps + (not last), count - top
    if spacing == "leading":
        times = np.arange(points, dtype=np.float64)[::-1] * (most // points) + offset
    elif spacing == "trailing":
        times = np.round(np.arange(most, 0, -count / steps)) - 1
    elif spacing == "linspace":
        times = np.linspace(0, most - 1, points)[::-1]
        times = times.round() if whole else times
    else:
        raise UsageError(f"unknown spacing {spacing!r}; there are {', '.join(SPACINGS)}.{nearest(spacing, SPACINGS)}")
    times = times[:steps]
    if len(times) < steps:
        raise UsageError(
            f"{steps} sampling steps were asked for; the trailing grid without {top} times has {len(times)}"
        )
    if times[0] >= count:
        raise UsageError(
            f"the leading grid of {steps} steps with offset {offset} starts at {times[0]:.0f}, "
            f"past the last training time {count - 1}; lower the offset"
        )
    return times


def ddim_times(spacing: str, steps: int, count: int = 1000, *, offset: int = 0) -> npt.NDArray[np.int64]:
    """Return the training times that DDIM and PNDM visit, (steps,), descending; see `spaced`."""
    return spaced(spacing, steps, count, offset=offset).astype(np.int64)


def check_times(times: Sequence[float], steps: int, bars: Array) -> Array:
    """Return the caller's own times, (steps,), in order: descending, each once, within the schedule."""
    given = np.asarray(times, np.float64)
    if given.ndim != 1 or len(given) != steps:
        raise UsageError(f"{steps} steps were asked for with {given.size} times; give one time a step")
    if not np.isfinite(given).all() or given.min() < 0 or given.max() > len(bars) - 1:
        raise UsageError(f"times go from 0 to {len(bars) - 1}; {_listed(given)} were given")
    if (np.diff(given) >= 0).any():
        raise UsageError(f"times must descend, each given once; {_listed(given)} were given")
    return given


def _listed(values: Array) -> str:
    shown = [f"{v:g}" for v in values[:8]]
    return ", ".join(shown + ["..."] * (len(values) > 8))
