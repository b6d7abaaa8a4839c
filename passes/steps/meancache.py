"""MeanCache: published schedules of a flow-matching sampler, with weights that follow the mean velocity.

On a reused step i ``v_i = v_{i-1} - (v_j - u) / (s_i - s_j) * (s_{i+1} - s_i)``, where ``j = i - S``, s are the noise
levels and ``u = (x_i - x_j) / (s_i - s_j)`` is the mean velocity since step j; S is a whole number for each stretch of
reused steps, and S = 1 repeats v. With Euler steps u is a mean of velocities, so v_i is a weighted sum of computed
ones. MeanCache (ICLR 2026); UnicomAI/MeanCache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Row = tuple[int, int, tuple[float, ...]]


@dataclass(frozen=True)
class Budget:
    """``computed`` steps of a run of ``steps``; ``orders``: S of the steps that follow each of them, 0 for none."""

    computed: tuple[int, ...]
    orders: tuple[int, ...]
    steps: int = 50


TABLES: Mapping[str, Mapping[int, Budget]] = {
    "z-image": {
        25: Budget(
            (0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 15, 16, 17, 18, 20, 22, 29, 37, 42, 45, 47, 48, 49),
            (0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 2, 0, 0, 0, 5, 5, 1, 1, 1, 5, 5, 0, 0),
        ),
        20: Budget(
            (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49),
            (0, 0, 0, 0, 2, 2, 2, 2, 2, 5, 4, 5, 5, 1, 1, 1, 5, 2, 0),
        ),
        17: Budget(
            (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 19, 27, 35, 43, 46, 48, 49),
            (0, 0, 0, 0, 2, 2, 2, 2, 2, 1, 1, 1, 1, 5, 2, 0),
        ),
        15: Budget(
            (0, 1, 2, 3, 5, 7, 10, 12, 17, 25, 33, 41, 45, 48, 49),
            (0, 0, 0, 2, 2, 2, 2, 1, 1, 1, 1, 5, 4, 0),
        ),
        13: Budget((0, 1, 2, 3, 5, 9, 15, 22, 29, 36, 43, 47, 49), (0, 0, 0, 2, 1, 1, 1, 1, 1, 1, 5, 2)),
    },
    "qwen-image": {
        25: Budget(
            (*range(17), 24, 32, 40, 43, 45, 47, 48, 49),
            (0,) * 16 + (1, 1, 1, 5, 5, 5, 0, 0),
        ),
        17: Budget(
            (*range(9), 10, 17, 24, 31, 38, 45, 48, 49),
            (0,) * 8 + (2, 1, 1, 1, 1, 1, 4, 0),
        ),
        10: Budget((0, 1, 3, 7, 14, 21, 28, 35, 42, 49), (0, 2, 1, 1, 1, 1, 1, 1, 4)),
    },
    "qwen-image-2512": {
        25: Budget(
            (*range(16), 23, 31, 37, 44, 45, 46, 47, 48, 49),
            (0,) * 15 + (2, 2, 2, 1, 1, 1, 5, 5, 0),
        ),
        17: Budget(
            (*range(10), 11, 19, 27, 35, 43, 47, 49),
            (0,) * 9 + (2, 1, 1, 1, 1, 5, 5),
        ),
        10: Budget((0, 2, 4, 7, 14, 21, 28, 35, 42, 49), (1, 3, 1, 1, 1, 1, 1, 1, 4)),
    },
}
"""Published schedules by model and number of computed steps, all for runs of 50."""


def noise_levels(steps: int, shift: float) -> list[float]:
    """``steps + 1`` levels of a flow-matching schedule from 1 to 0, shifted: ``shift t / (1 + (shift - 1) t)``."""
    times = 1 - np.arange(steps + 1) / steps
    return [float(s) for s in shift * times / (1 + (shift - 1) * times)]


def rows(computed: Sequence[int], orders: Sequence[int], levels: Sequence[float]) -> tuple[tuple[Row, ...], int]:
    """Weights for each reused step that does more than repeat, for `forecast.Table`, and how many tensors they need.

    ``levels`` are the noise levels, one more than there are steps.
    """
    steps, last = len(levels) - 1, -1
    basis = {step: i for i, step in enumerate(computed)}
    velocities: list[np.ndarray] = []
    found: list[tuple[int, int, np.ndarray]] = []
    for step in range(steps):
        if step in basis:
            last = step
            velocities.append(np.eye(len(computed))[basis[step]])
            continue
        begin = max(0, step - max(1, orders[basis[last]]))
        span = levels[step] - levels[begin]
        mean = sum(velocities[i] * (levels[i + 1] - levels[i]) for i in range(begin, step)) / span
        slope = (velocities[begin] - mean) / span
        velocities.append(velocities[-1] - slope * (levels[step + 1] - levels[step]))
        # Newest first, as the store has them.
        weights = velocities[-1][: basis[last] + 1][::-1]
        if np.abs(weights[1:]).max(initial=0.0) > 1e-12:
            found.append((step, last, weights))
    history = max((int(np.flatnonzero(np.abs(w) > 1e-12)[-1]) + 1 for _, _, w in found), default=1)
    padded = (np.pad(w, (0, max(0, history - len(w))))[:history] for _, _, w in found)
    return tuple((s, c, tuple(map(float, w))) for (s, c, _), w in zip(found, padded, strict=True)), history
