"""Weights of the last computed results that stand best for a reused one, fitted to recorded runs.

Results of a run are points in a space of many dimensions; all that least squares needs of them is their products,
``products[i, j] = <H_i, H_j>`` of calls i and j, summed over the recorded runs. Weights add up to one, so that what
does not change stays as it is: the free ones weigh differences to the newest result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hasten.passes.steps.fitting import Floats

RIDGE = 1e-6
"""Of the mean square of the differences: near-equal results must not get huge weights of opposite sign."""


@dataclass(frozen=True)
class Fit:
    """``products`` (N, N) of N calls' results; a forecast is made from the last ``history`` computed ones."""

    products: Floats
    history: int
    _known: dict[tuple[tuple[int, ...], int], Floats] = field(default_factory=dict, repr=False, compare=False)

    def weights(self, stored: tuple[int, ...], call: int) -> Floats:
        """The weights (K,) for ``call`` of the ``stored`` calls' results, newest first; fewer than K get zeros."""
        key = stored, call
        if key not in self._known:
            self._known[key] = self._solved(stored, call)
        return self._known[key]

    def of_mask(self, bits: str) -> tuple[float, ...]:
        """The weights of all reused calls of a mask, call by call, as the mask policy's option has them."""
        rows = (self.weights(stored, call) for call, stored in _reused(bits, self.history))
        return tuple(float(f"{w:.7g}") for row in rows for w in row)

    def error(self, bits: str) -> float:
        """The error to expect of a mask, if it left the run where it is: the errors of each gap's sum, added up."""
        total = 0.0
        gaps: dict[int, Floats] = {}
        for call, stored in _reused(bits, self.history):
            missed = gaps.setdefault(stored[0], np.zeros(len(self.products)))
            missed[list(stored)] -= self.weights(stored, call)[: len(stored)]
            missed[call] += 1
        for missed in gaps.values():
            total += float(np.sqrt(max(float(missed @ self.products @ missed), 0.0)))
        return total

    def _solved(self, stored: tuple[int, ...], call: int) -> Floats:
        newest, *older = stored
        weights = np.zeros(self.history)
        weights[0] = 1.0
        if older:
            steps = np.zeros((len(older), len(self.products)))
            steps[:, newest] = 1.0
            steps[range(len(older)), older] = -1.0
            wanted = np.zeros(len(self.products))
            wanted[call], wanted[newest] = 1.0, -1.0
            square = steps @ self.products @ steps.T
            square += RIDGE * np.trace(square) / len(older) * np.eye(len(older))
            found = np.linalg.lstsq(square, steps @ self.products @ wanted, rcond=None)[0]
            weights[0] += found.sum()
            weights[1 : len(stored)] = -found
        return weights


def _reused(bits: str, history: int) -> list[tuple[int, tuple[int, ...]]]:
    """Each reused call, and the computed ones that it is made from, newest first."""
    stored: tuple[int, ...] = ()
    found = []
    for call, bit in enumerate(bits):
        if bit == "1" or call == 0:
            stored = (call, *stored)[:history]
        else:
            found.append((call, stored))
    return found
