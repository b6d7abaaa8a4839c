"""Noise schedules of the training and the grids that samplers choose from them; numpy only, float64.

``alpha_bar[t]`` is the squared signal level a^2 at training time t: a noisy sample is ``y = a x0 + b eps`` with ``b^2 =
1 - a^2``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError, nearest

Array = npt.NDArray[np.float64]

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


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


def ddim_times(spacing: str, steps: int, count: int = 1000, *, offset: int = 0) -> npt.NDArray[np.int64]:
    """Return the training times that DDIM and PNDM visit, descending (Lin et al., 2305.08891, table 2).

    ``offset`` (diffusers: ``steps_offset``) shifts the leading grid only. Other samplers mean other grids by the same
    words.
    """
    if not 1 <= steps <= count:
        raise UsageError(f"{steps} sampling steps were asked for; the schedule has times for 1 to {count}")
    if spacing == "leading":
        times = np.arange(steps, dtype=np.float64)[::-1] * (count // steps) + offset
    elif spacing == "trailing":
        times = np.round(np.arange(count, 0, -count / steps)) - 1
    elif spacing == "linspace":
        times = np.linspace(0, count - 1, steps).round()[::-1]
    else:
        raise UsageError(f"unknown spacing {spacing!r}; there are {', '.join(SPACINGS)}.{nearest(spacing, SPACINGS)}")
    if times[0] >= count:
        raise UsageError(
            f"the leading grid of {steps} steps with offset {offset} starts at {times[0]:.0f}, "
            f"past the last training time {count - 1}; lower the offset"
        )
    return times.astype(np.int64)


def to_x0(prediction: str, a: Any, b: Any) -> tuple[Array, Array]:
    """``(cy, cf)`` with ``x0 = cy y + cf f`` for a network that predicts epsilon, the sample, or v = a eps - b x0.

    ``a`` and ``b`` are (M,), y = a x0 + b eps, a^2 + b^2 = 1.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if prediction == "epsilon":
        if (a == 0).any():
            raise UsageError(
                "epsilon prediction says nothing where the signal level is zero; use v_prediction or sample"
            )
        return 1 / a, -b / a
    if prediction == "sample":
        return np.zeros_like(a), np.ones_like(a)
    if prediction == "v_prediction":
        return a, -b
    raise UsageError(
        f"unknown prediction type {prediction!r}; there are {', '.join(PREDICTIONS)}.{nearest(prediction, PREDICTIONS)}"
    )
