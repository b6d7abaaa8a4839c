"""The numbers that a run of a step cache is told: what each may be."""

from __future__ import annotations

from typing import Any, cast

from hasten.passes.steps.options import Option

_LARGEST = 3e38
"""Of float32, which a threshold is compared in."""
_THRESHOLD = Option("number", "how much may change before a call computes; 0 computes every call", low=0, high=_LARGEST)
_LIMIT = Option("integer", "most consecutive reuses, -1 for any number", low=-1, high=2**62)
_STEPS = Option("integer", "calls of a run", low=1, high=2**62)


def threshold(value: Any) -> float:
    """A threshold; `UsageError` for what is none."""
    return cast(float, _THRESHOLD.read("threshold", value))


def limit(value: Any) -> int:
    """A limit of consecutive reuses; `UsageError` for what is none."""
    return cast(int, _LIMIT.read("limit", value))


def steps(value: Any) -> int:
    """A number of calls; `UsageError` for what is none."""
    return cast(int, _STEPS.read("steps", value))
