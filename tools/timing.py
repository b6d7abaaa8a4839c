"""Times of several things that take turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds of the single runs, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, part: float) -> float:
        """The time that ``part`` of the runs stay under, linear between runs.

        >>> Times((1.0, 2.0, 3.0)).quantile(0.25)
        1.5
        """
        ordered = sorted(self.seconds)
        place = part * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": len(self.seconds),
            "median": self.median,
            "p20": self.quantile(0.2),
            "p80": self.quantile(0.8),
        }


def take_turns(functions: Sequence[Callable[[], object]], rounds: int) -> list[Times]:
    """Time every function ``rounds`` times, in an order that is reversed every other round. Nothing warms up here."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        order = range(len(functions))
        for i in order if turn % 2 == 0 else reversed(order):
            started = time.perf_counter()
            functions[i]()
            seconds[i].append(time.perf_counter() - started)
    return [Times(tuple(s)) for s in seconds]
