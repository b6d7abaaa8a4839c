"""Masks whose reused calls are weighed sums of computed ones: weights fitted to runs, and what a mask does with them.

The whole model is left out, so a reused call needs none of its graph: what the model predicted is all there is to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from hasten.errors import UsageError
from hasten.passes.steps.fitting_search import Search
from hasten.passes.steps.fitting_weights import Fit

if TYPE_CHECKING:
    from hasten.backends.calibrate_runs import Draw
    from hasten.backends.calibrate_trial import Trials

GUESSES = 4000
"""Masks whose error is estimated from the recorded products before any is tried."""


class Weighed:
    """Trials of masks on ``draws`` with fitted weights of the last ``history`` results."""

    def __init__(self, trials: Trials, draws: Sequence[Draw], history: int) -> None:
        self.trials, self.draws, self.history = trials, draws, history

    @cached_property
    def fit(self) -> Fit:
        """The weights' fit to the draws' runs without a cache."""
        total = np.zeros((self.trials.runs.steps,) * 2)
        for draw in self.draws:
            felt = torch.stack([self._felt(p).flatten().double() for p in self.trials.predictions(draw)])
            total += (felt @ felt.T).numpy() / felt.shape[1]
        return Fit(total / len(self.draws), self.history)

    def guess(self, start: str, seed: int) -> str:
        """The best mask with as many computed calls as ``start``, by the products alone."""
        return Search(self.fit.error, GUESSES, seed=seed).run(start)[0]

    def error(self, mask: str) -> float:
        """The mean squared error of the draws' results."""
        return sum(self._one(draw, mask) for draw in self.draws) / len(self.draws)

    def _one(self, draw: Draw, mask: str) -> float:
        expected = self.trials.uncached(draw)
        result = self.trials.runs.run(self._denoise(mask, self.trials.predictions(draw)), draw)
        return float((result - expected).square().mean())

    def _denoise(self, mask: str, known: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor]:
        call = -1
        stored: tuple[int, ...] = ()
        results: list[torch.Tensor] = []
        first = mask.find("0")  # up to it, a run goes as it did without a cache

        def denoise(*tensors: torch.Tensor) -> torch.Tensor:
            nonlocal call, stored, results
            call += 1
            if mask[call] == "0":
                weights = self.fit.weights(stored, call)
                return sum((float(w) * r for w, r in zip(weights, results, strict=False)), torch.zeros(()))
            result = known[call] if call < first else self.trials.plain(*tensors)
            stored, results = (call, *stored)[: self.history], [result, *results][: self.history]
            return result

        return denoise

    def _felt(self, prediction: torch.Tensor) -> torch.Tensor:
        """What the sampler sees of a prediction: with guidance, one sum of its two halves."""
        guidance = self.trials.runs.guidance
        if guidance in (None, 1):
            return prediction
        with_label, without = prediction.chunk(2)
        return without + guidance * (with_label - without)


def check_whole(granularity: str) -> None:
    """Refuse a region that is not the whole model."""
    if granularity != "output":
        raise UsageError(
            f"payload=fitted is calibrated for the whole model, and granularity={granularity} was asked for; give "
            "granularity=output"
        )
