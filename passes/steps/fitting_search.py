"""Search of a mask by trying: simulated annealing, then hill climbing, on the error of the run's final result.

Needs nothing but a function from masks to errors, so it serves every model and payload; the idea is BudCache's (2026).
The number of computed calls stays what it is at the start. No mask is tried twice: a search that was interrupted, and
is given the errors known by then, the same seed and the same number of evaluations, ends as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

import numpy as np

from hasten.errors import UsageError

HOT, COLD = 0.2, 0.002
"""Temperatures at the beginning and the end, in parts of the best error so far."""
ANNEALED = 0.7
"""The part of the evaluations that anneals; the rest climbs."""
PATIENCE = 30
"""Proposals for each evaluation, most of them known masks, before annealing ends early; climbs after the first."""


class _SpentError(Exception):
    """The budget is gone: the best mask so far is the result."""


@dataclass
class Search:
    """``evaluations`` bounds the masks that are looked at, known ones included; ``seconds`` the time that it takes."""

    error: Callable[[str], float]
    evaluations: int
    seconds: float = math.inf
    seed: int = 0
    known: MutableMapping[str, float] = field(default_factory=dict)

    def run(self, start: str) -> tuple[str, float]:
        """Return the best mask with as many computed calls as ``start``, and its error."""
        if start[:1] != "1" or set(start) - {"0", "1"}:
            raise UsageError(f"a search starts from a mask of 1 and 0 whose first call computes, not from {start!r}")
        self._random = np.random.default_rng(self.seed)
        self._stop = time.monotonic() + self.seconds
        self._best = (math.inf, start)
        self._seen: set[str] = set()
        try:
            current = self._try(start)
            if 1 < start.count("1") < len(start):
                self._anneal(start, current)
                self._climb(*self._best)
                self._wander()
        except _SpentError:
            pass
        return self._best[1], self._best[0]

    def _try(self, mask: str) -> float:
        if mask not in self._seen and len(self._seen) >= self.evaluations:
            raise _SpentError
        if mask not in self.known:
            if time.monotonic() > self._stop:
                raise _SpentError
            value = float(self.error(mask))
            self.known[mask] = value if math.isfinite(value) else math.inf
        self._seen.add(mask)
        value = self.known[mask]
        self._best = min(self._best, (value, mask))
        return value

    def _anneal(self, mask: str, error: float) -> None:
        budget = max(1, int(ANNEALED * self.evaluations))
        for proposal in range(PATIENCE * budget):
            done = max(len(self._seen) / budget, proposal / (PATIENCE * budget))
            if done >= 1:
                return
            candidate = self._moved(mask)
            found = self._try(candidate)
            heat = HOT * (COLD / HOT) ** done * self._best[0]
            worse = found - error
            if worse <= 0 or (heat > 0 and self._random.random() < math.exp(-worse / heat)):
                mask, error = candidate, found

    def _moved(self, mask: str) -> str:
        """One computed call elsewhere: mostly near where it was."""
        computed = [n for n in range(1, len(mask)) if mask[n] == "1"]
        free = [n for n in range(1, len(mask)) if mask[n] == "0"]
        chosen = int(self._random.choice(computed))
        near = [n for n in free if abs(n - chosen) <= 3]
        target = int(self._random.choice(near if near and self._random.random() < 0.8 else free))
        return _swapped(mask, chosen, target)

    def _climb(self, error: float, mask: str) -> None:
        """Shift one computed call by one or two, as long as that is better."""
        improved = True
        while improved:
            improved = False
            for chosen in self._random.permutation(len(mask) - 1) + 1:
                for target in (chosen - 1, chosen + 1, chosen - 2, chosen + 2):
                    if 1 <= target < len(mask) and mask[chosen] == "1" and mask[target] == "0":
                        candidate = _swapped(mask, int(chosen), int(target))
                        found = self._try(candidate)
                        if found < error:
                            mask, error, improved = candidate, found, True

    def _wander(self) -> None:
        """Climb again from near the best, until the budget is spent or there is nothing new nearby."""
        for _ in range(PATIENCE):
            mask = self._best[1]
            for _ in range(3):
                mask = self._moved(mask)
            self._climb(self._try(mask), mask)


def _swapped(mask: str, computed: int, free: int) -> str:
    bits = list(mask)
    bits[computed], bits[free] = "0", "1"
    return "".join(bits)
