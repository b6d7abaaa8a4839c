"""What was recorded of runs that computed every call, reduced to numbers, and what a mask of such a run is worth.

N steps, K distances. Everything that is fitted or searched for a step cache starts from `Sample`: one run each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import HastenError, UsageError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moves:
    """How one value V moves in a run: ``size[n] = mean|V(n)|`` and ``moves[k - 1, n] = mean|V(n) - V(n - k)|``.

    ``size`` is (N,), ``moves`` (K, N), NaN where n < k. Every relative distance over at most K calls follows.
    """

    size: Floats
    moves: Floats

    def from_earlier(self, step: int, earlier: int) -> float:
        """``mean|V(step) - V(earlier)| / mean|V(earlier)|``; NaN beyond K calls, as what was not measured."""
        apart = step - earlier
        if not 1 <= apart <= len(self.moves):
            return math.nan
        return divided(float(self.moves[apart - 1, step]), float(self.size[earlier]))

    def to_next(self) -> Floats:
        """The relative distance of each call from the one before, (N,); 0 for the first."""
        return np.array([0.0, *(self.from_earlier(n, n - 1) for n in range(1, len(self.size)))])


def moves_of_errors(errors: Floats) -> Moves:
    """Distances to a later value, as SmoothCache has them, in the place of a value's moves: sizes are 1."""
    moves = np.full_like(errors, np.nan)
    for apart in range(1, min(len(errors), errors.shape[1] - 1) + 1):
        moves[apart - 1, apart:] = errors[apart - 1, : errors.shape[1] - apart]
    return Moves(np.ones(errors.shape[1]), moves)


@dataclass(frozen=True)
class Sample:
    """One recorded run. ``values`` by name: ``input``, ``output``, ``residual``, ``value`` and ``signal``.

    ``ratios`` (N,): ``|R_n| / |R_{n-1}|`` of the residual R, averaged over tokens; the first is 1. ``errors`` (K, N) by
    kind of module: ``errors[k - 1, n] = |L(n) - L(n + k)|_1 / |L(n + k)|_1`` of outputs L, averaged over the modules.
    """

    seed: int
    label: str
    values: Mapping[str, Moves]
    ratios: Floats = field(default_factory=lambda: np.zeros(0))
    errors: Mapping[str, Floats] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seven digits, null for what does not exist."""
        return {
            "seed": self.seed,
            "label": self.label,
            "values": {name: {"size": _plain(v.size), "moves": _plain(v.moves)} for name, v in self.values.items()},
            "ratios": _plain(self.ratios),
            "errors": {kind: _plain(rows) for kind, rows in self.errors.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], steps: int) -> Sample:
        """Read `as_dict`'s; `UsageError` where a curve is missing or has another length than ``steps``."""
        try:
            made = cls(
                int(content["seed"]),
                str(content["label"]),
                {n: Moves(_array(v["size"]), _array(v["moves"])) for n, v in content["values"].items()},
                _array(content["ratios"]),
                {kind: _array(rows) for kind, rows in content["errors"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"a recorded sample cannot be read: {type(error).__name__} {error}") from None
        for name, length in made._lengths().items():
            if length not in (0, steps):
                raise UsageError(f"a recorded sample has {length} entries of {name}, and its run {steps} steps")
        return made

    def check_finite(self) -> None:
        """Raise `HastenError` that names the first value which was NaN or infinite while it was recorded."""
        curves = {name: v.size for name, v in self.values.items()} | {"ratios": self.ratios}
        curves |= {f"{name}'s change": v.moves[0][1:] for name, v in self.values.items() if len(v.moves)}
        curves |= {f"{kind}'s change": rows[0][:-1] for kind, rows in self.errors.items() if len(rows)}
        for name, curve in curves.items():
            if len(bad := np.flatnonzero(~np.isfinite(curve))):
                raise HastenError(
                    f"recording of seed {self.seed}, {self.label}: {name} is {curve[bad[0]]} at step {bad[0]}; the "
                    "model does not compute finite numbers there, so nothing can be fitted: check its weights and dtype"
                )

    def _lengths(self) -> dict[str, int]:
        found = {"ratios": len(self.ratios)} | {f"{n}'s size": len(v.size) for n, v in self.values.items()}
        found |= {f"{n}'s moves": v.moves.shape[-1] for n, v in self.values.items()}
        return found | {f"{kind}'s errors": rows.shape[-1] for kind, rows in self.errors.items()}


def speedup(masks: Sequence[str], share: float) -> float:
    """How much faster runs with these masks are, where a reused call leaves out ``share`` of a call's operations."""
    cost = np.mean([1 - share * mask.count("0") / len(mask) for mask in masks])
    return math.inf if cost <= 0 else float(1 / cost)


def most_computed(wanted: float, steps: int, share: float) -> int:
    """The most calls of a run that may compute for a speed-up; `UsageError` where one computed call is too many."""
    most = math.floor(steps * (1 - (1 - 1 / wanted) / share) + 1e-9)
    if most < 1:
        best = speedup(["1" + "0" * (steps - 1)], share)
        raise UsageError(
            f"speedup {wanted:g} was asked for; a reused call leaves out {share:.0%} of the operations, so {steps} "
            f"steps with one computed call are {best:.3g} times as fast: ask for less, or for a larger region"
        )
    return min(most, steps)


def divided(change: float, size: float) -> float:
    """``change / size``: 0 for 0/0, infinity for anything else over 0, as in `hasten.passes.steps.policy.ratio`."""
    if size == 0:
        return math.inf if change > 0 else change
    return change / size


def _plain(array: Floats) -> list[Any]:
    if array.ndim > 1:
        return [_plain(row) for row in array]
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in array.tolist()]


def _array(rows: Any) -> Floats:
    return np.array(rows, np.float64)  # null becomes NaN
