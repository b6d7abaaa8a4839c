"""The best mask of so many computed calls, from the error of every segment: computed call, reused ones, computed call.

A mask is a path over the calls of a run, an edge (i, j) reuses i + 1 to j - 1. The path sought has the least largest
error, and among equals the least second largest, and so on: LeMiCa's lexicographic minimax (Gao et al., 2511.00090), or
the least sum. Its edges are measured one by one on the run's final result; a cheaper stand-in is how far the residual
moves while it is reused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hasten.errors import UsageError
from hasten.passes.steps.fitting import Floats, Moves
from hasten.passes.steps.schedules import bits_of_steps

RANKS = ("minimax", "sum")


def empty(steps: int, longest: int) -> Floats:
    """Errors of segments, (N, N + 1): 0 where nothing is reused, NaN for those to fill in, infinity for the others.

    ``longest`` is the most reuses in a row. The column N is the run's end.
    """
    errors = np.full((steps, steps + 1), np.inf)
    for start in range(steps):
        errors[start, start + 1] = 0.0
        errors[start, start + 2 : min(start + longest + 2, steps + 1)] = np.nan
    return errors


def segment(start: int, stop: int, steps: int) -> str:
    """The mask that reuses ``start + 1`` to ``stop - 1`` and nothing else."""
    return "1" * (start + 1) + "0" * (stop - start - 1) + "1" * (steps - stop)


def measured(steps: int, longest: int, error: Callable[[str], float]) -> Floats:
    """Errors of all segments, each from the error of the mask that has this segment alone."""
    errors = empty(steps, longest)
    for start, stop in np.argwhere(np.isnan(errors)).tolist():
        value = error(segment(start, stop, steps))
        errors[start, stop] = value if np.isfinite(value) else np.inf
    return errors


def from_moves(kept: Moves, longest: int) -> Floats:
    """Errors of all segments from how far the kept value moves while it is reused, relative to what it should be."""
    steps = len(kept.size)
    errors = empty(steps, min(longest, len(kept.moves)))
    for start, stop in np.argwhere(np.isnan(errors)).tolist():
        reused = range(start + 1, stop)
        errors[start, stop] = sum(kept.moves[n - start - 1, n] / max(kept.size[n], 1e-30) for n in reused)
    return errors


def best_mask(errors: Floats, computed: int, rank: str = "minimax") -> str:
    """The mask of exactly ``computed`` calls; `UsageError` where segments of the measured lengths cannot make one."""
    steps = len(errors)
    nothing, join = _RANKS[rank]
    paths: dict[int, tuple[Any, tuple[int, ...]]] = {0: (nothing, (0,))}
    for _ in range(computed - 1):
        paths = _extended(paths, errors, join, range(steps))
    found = _extended(paths, errors, join, range(steps, steps + 1))
    if not found:
        longest = max(int(np.isfinite(row).sum()) for row in errors) - 1
        raise UsageError(
            f"{computed} computed of {steps} steps cannot be had with at most {longest} reuses in a row; allow longer "
            "ones, or compute more"
        )
    return bits_of_steps(found[steps][1][:-1], steps)


def _extended(
    paths: dict[int, tuple[Any, tuple[int, ...]]], errors: Floats, join: Callable[[Any, float], Any], ends: range
) -> dict[int, tuple[Any, tuple[int, ...]]]:
    """The best path one edge longer to every end that can be reached."""
    made: dict[int, tuple[Any, tuple[int, ...]]] = {}
    for end in ends:
        reached = [
            (join(cost, float(errors[start, end])), (*path, end))
            for start, (cost, path) in paths.items()
            if start < end and np.isfinite(errors[start, end])
        ]
        if reached:
            made[end] = min(reached)
    return made


def _minimax(cost: tuple[float, ...], error: float) -> tuple[float, ...]:
    return tuple(sorted((*cost, error), reverse=True))


def _sum(cost: float, error: float) -> float:
    return cost + error


_RANKS: dict[str, tuple[Any, Callable[[Any, float], Any]]] = {"minimax": ((), _minimax), "sum": (0.0, _sum)}
