"""A mask of a given number of computed calls, found by what it does to the results of real runs."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import UsageError
from hasten.passes.steps.fitting import Moves, Sample, most_computed, moves_of_errors
from hasten.passes.steps.fitting_path import RANKS, best_mask, from_moves, measured
from hasten.passes.steps.fitting_search import Search

Error = Callable[[str], float]
"""A mask to the mean squared error of the runs' results."""


@dataclass(frozen=True)
class Bounds:
    """How long a search may take: masks tried by annealing and climbing, and seconds.

    ``longest`` reuses in a row are measured segment by segment first, unless 0; that takes about ``longest`` times as
    many further runs as a run has steps.
    """

    evaluations: int = 0
    seconds: float = math.inf
    longest: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The best mask, its error, and how it compares: name of the step of the search -> (mask, error)."""

    mask: str
    error: float
    stages: dict[str, tuple[str, float]]


def computed_calls(speedup: float, steps: int, share: float, start: str | None) -> int:
    """How many calls compute: as many as the mask to start from has, else the most that give the speed-up."""
    if start is None:
        return most_computed(speedup, steps, share)
    if len(start) != steps:
        raise UsageError(f"mask: {len(start)} decisions were given for a run of {steps} steps; give one a step")
    return start.count("1")


def kept(sample: Sample, payload: str) -> Moves:
    """How what a payload keeps moves in a recorded run; of modules that are skipped one by one, all together."""
    if sample.errors:
        return moves_of_errors(np.mean(list(sample.errors.values()), axis=0))
    return sample.values["residual" if payload.endswith("residual") else "value"]


def guessed(moves: Sequence[Moves], computed: int, rank: str) -> str:
    """The mask along which what is kept moves least, on average over the recorded runs."""
    errors = np.mean([from_moves(m, len(m.moves)) for m in moves], axis=0)
    return best_mask(errors, computed, rank)


def search(
    moves: Sequence[Moves],
    computed: int,
    start: str | None,
    bounds: Bounds,
    error: Error,
    known: MutableMapping[str, float],
    guess: Callable[[str, int], str] | None = None,
) -> Found:
    """Start from the path along which what is kept moves least, and better it within the bounds.

    ``moves`` are those of what is kept, in each recorded run. ``known`` errors are not measured again, and new ones
    are added. ``guess`` makes a better first mask of one and a seed, without a run.
    """
    stages: dict[str, tuple[str, float]] = {}

    def tried(mask: str) -> float:
        if mask not in known:
            value = error(mask)
            known[mask] = value if math.isfinite(value) else math.inf
        return known[mask]

    def enter(name: str, mask: str) -> None:
        stages[name] = (mask, tried(mask))

    if start is not None:
        enter("given", start)
    for rank in RANKS:
        enter(f"recorded distances, {rank}", guessed(moves, computed, rank))
    if guess is not None:
        enter("recorded products", guess(guessed(moves, computed, "sum"), bounds.seed))
    if bounds.longest:
        segments = measured(len(moves[0].size), bounds.longest, tried)
        for rank in RANKS:
            enter(f"measured segments, {rank}", best_mask(segments, computed, rank))
    if bounds.evaluations:
        best, _ = min(stages.values(), key=_error)
        found = Search(tried, bounds.evaluations, bounds.seconds, bounds.seed, known).run(best)
        stages["annealing and climbing"] = found
    mask, least = min(stages.values(), key=_error)
    return Found(mask, least, stages)


def _error(stage: tuple[str, float]) -> Any:
    return stage[1]
