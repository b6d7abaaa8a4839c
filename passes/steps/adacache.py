"""AdaCache: each computed call plans the next, by how far a residual inside the region moved since the last one.

``d = |c - p|_1 / |c|_1 / rate`` of the attention residual now (p) and at the last computed call (c), over the distance
that had been planned between them; a codebook turns d into the distance to the next computed call. The measurement is
made inside the region, only on calls that compute, so the decision is one comparison of whole numbers. Kahatapitiya et
al., 2411.02397; AdaCache-DiT/AdaCache. What is reused is the payload's matter: all layers share the schedule and what
the reference stores are residuals behind their gates, so one residual of the whole stack stands for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hasten.passes.steps.moreg import Motion
from hasten.passes.steps.policy import Array, Control, Slot, State, as_float32, mean_abs, namespace, ratio, settle
from hasten.passes.steps.retained import Retained

Codebook = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Codes:
    """``codebook``: (bound, rate) pairs; the first whose bound exceeds d counts, the last where none does."""

    codebook: Codebook
    window: tuple[int, int]


CODEBOOKS: Mapping[str, Codes] = {
    "100-fast": Codes(((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)), (10, 90)),
    "30-fast": Codes(((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1)), (4, 26)),
    "30-slow": Codes(((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.0, 1)), (4, 26)),
}
"""The reference's sets, named after the number of steps, each with MoReg's window of calls."""


@dataclass(frozen=True)
class AdaCache:
    """``codebook`` as in `Codes`; the last bound is not compared. ``motion``: MoReg, None for none."""

    codebook: Codebook
    limit: int = -1
    motion: Motion | None = None
    retained: Retained = field(default_factory=lambda: Retained(first=1, last=2))
    name: ClassVar[str] = "adacache"
    signal: ClassVar[str] = ""
    tap: ClassVar[str] = "attention-residual"
    threshold: ClassVar[float] = 0.0

    def slots(self) -> Mapping[str, Slot]:
        slots = {
            "reference": Slot(like="tap"),
            "rate": Slot(dtype="int64", start=1),
            "due": Slot(dtype="int64"),
            "count": Slot(dtype="int64"),
        }
        return slots if self.motion is None else {**slots, "motion": Slot(dtype="float32", start=1.0)}

    def decide(self, state: State, signal: Array | None, control: Control) -> tuple[State, Array]:
        wanted = (control.step >= state["due"]) | self.retained.wanted(control)
        compute, count = settle(wanted, state["count"], control)
        return {**state, "count": count}, compute

    def observe(self, state: State, tap: Array, before: Array, after: Array, control: Control) -> State:
        xp = namespace(tap, *control)
        first = control.step == 0
        planned = xp.where(first, xp.ones_like(state["rate"]), state["rate"])
        following = {}
        change, size = mean_abs(as_float32(state["reference"]) - as_float32(tap)), mean_abs(state["reference"])
        # Nothing to compare with, 0/0 as well, counts as far away.
        distance = xp.where(size > 0, ratio(change, size), xp.full_like(change, float("inf"))) / as_float32(planned)
        if self.motion is not None:
            score = self.motion.score(tap, control.step)
            distance = distance * self.motion.factor(score, state["motion"], as_float32(planned))
            score = xp.where(xp.isfinite(score), score, xp.ones_like(score))
            # The first call has nothing to compare with, and measures no motion.
            start = xp.ones_like(score) if self.motion.reset else state["motion"]
            following["motion"] = xp.where(first, start, score)
        rate = xp.full_like(planned, self.codebook[-1][1])
        for bound, value in reversed(self.codebook[:-1]):
            rate = xp.where(distance < xp.full_like(distance, bound), xp.full_like(planned, value), rate)
        rate = xp.where(first, xp.ones_like(rate), rate)
        return {**state, **following, "reference": tap, "rate": rate, "due": control.step + rate}

    def forced(self, steps: int) -> npt.NDArray[np.int64]:
        return self.retained.calls(steps)

    def mask(self, steps: int) -> npt.NDArray[np.bool_] | None:
        return None
