"""The threshold that gives a wanted speed-up, from what a policy would have done in recorded runs.

A recorded run computed every call. A policy that reuses moves the run a little away from it, so a predicted mask is
near the real one, not the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import UsageError
from hasten.passes.steps.easycache import EasyCache
from hasten.passes.steps.first_block import FirstBlock
from hasten.passes.steps.fitting import Sample, divided, speedup
from hasten.passes.steps.plan import planned
from hasten.passes.steps.policy import COMPUTE, Policy
from hasten.passes.steps.retained import control_at
from hasten.passes.steps.simulate import Recording, fresh, predict
from hasten.passes.steps.teacache import TeaCache

GRID = np.geomspace(1e-4, 1e3, 29)
"""Thresholds tried first; the one sought is then found between two of them by halving."""
HALVINGS = 12


@dataclass(frozen=True)
class Prediction:
    """One threshold: the mask of every sample, and the speed-up of all of them together."""

    threshold: float
    masks: tuple[str, ...]
    speedup: float

    @property
    def computed(self) -> float:
        """Computed calls in a run, on average."""
        return float(np.mean([mask.count("1") for mask in self.masks]))


def predicted(policy: Policy, sample: Sample, threshold: float) -> str:
    """The mask that ``policy`` would have had in a recorded run."""
    decision = policy.decision
    if isinstance(decision, TeaCache):
        distances = sample.values["signal"].to_next().tolist()
        return predict(policy, Recording(distances=distances), threshold=threshold)
    if isinstance(decision, FirstBlock):
        return _first_block(decision, sample, threshold)
    if isinstance(decision, EasyCache):
        return _easycache(decision, sample, threshold)
    raise UsageError(
        f"{policy.name} has no threshold on recorded distances; those that have: teacache, first-block, "
        "dbcache, easycache"
    )


def at(policy: Policy, samples: Sequence[Sample], share: float, threshold: float) -> Prediction:
    """Predict every sample's mask at one threshold."""
    masks = tuple(predicted(policy, sample, threshold) for sample in samples)
    return Prediction(threshold, masks, speedup(masks, share))


def reaching(policy: Policy, samples: Sequence[Sample], share: float, wanted: float) -> Prediction:
    """The smallest threshold found whose predicted speed-up is at least ``wanted``; `UsageError` where there is none.

    The speed-up need not grow with the threshold everywhere; what is returned reaches it in any case.
    """
    below, best = 0.0, at(policy, samples, share, float(GRID[0]))
    for candidate in GRID:
        found = at(policy, samples, share, float(candidate))
        if found.speedup > best.speedup:
            best = found
        if found.speedup >= wanted:
            return _halved(policy, samples, share, wanted, below, found)
        below = found.threshold
    raise UsageError(
        f"{policy.name}: no threshold makes the recorded runs {wanted:g} times as fast; the most is "
        f"{best.speedup:.3g} times, {best.computed:.3g} of {len(best.masks[0])} calls computed: loosen limit, warmup, "
        "first or last, or ask for less"
    )


def _halved(
    policy: Policy, samples: Sequence[Sample], share: float, wanted: float, below: float, found: Prediction
) -> Prediction:
    for _ in range(HALVINGS):
        middle = at(policy, samples, share, (below + found.threshold) / 2)
        if middle.speedup >= wanted:
            found = middle
        else:
            below = middle.threshold
    return found


def _first_block(decision: FirstBlock, sample: Sample, threshold: float) -> str:
    probe, steps = sample.values["signal"], len(sample.values["signal"].size)
    state = fresh({name: slot for name, slot in decision.slots().items() if not slot.like}, {})
    force, bits, last = decision.forced(steps), "", 0
    for step in range(steps):
        distance = np.asarray(probe.from_earlier(step, last), np.float32)
        control = control_at(step, steps, force=int(force[step]), threshold=threshold, limit=decision.limit)
        state, compute = decision.judge(state, distance, control)
        last = step if compute else last
        bits += str(int(bool(compute)))
    return bits


def _easycache(decision: EasyCache, sample: Sample, threshold: float) -> str:
    """`EasyCache.decide` and `observe` on the sizes of differences in place of the differences."""
    moved, gained = sample.values["input"], sample.values["output"]
    steps = len(moved.size)
    force = planned(decision, steps)
    bits, last, slope, error, reused = "", 0, math.inf, 0.0, 0
    for step in range(steps):
        if step:
            error += divided(slope * float(moved.moves[0, step]), float(gained.size[last]))
        full = 0 <= decision.limit <= reused
        compute = force[step] == COMPUTE or full or not (error < threshold) or threshold <= 0
        if compute:
            apart = step - last
            if step:
                slope = math.nan
                if apart <= len(moved.moves):
                    slope = divided(float(gained.moves[apart - 1, step]), float(moved.moves[apart - 1, step]))
            last, error, reused = step, 0.0, 0
        else:
            reused += 1
        bits += str(int(compute))
    return bits
