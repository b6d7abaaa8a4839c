"""FirstBlockCache and DBCache: run the first blocks, and the others only where the first ones' residual changed.

The distance is ``mean|r - r_c| / mean|r_c|`` between the probe's residual now and at the last *computed* call, so that
drift cannot add up unseen. ParaAttention (chengzeyi) and diffusers' ``first_block_cache.py``; with a warm-up, a limit
of reuses in all and more blocks always computed at either end: cache-dit's DBCache (vipshop). A distance that is not
finite computes; diffusers' hook, which asks whether it is greater than the threshold, would reuse from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hasten.passes.steps.policy import COMPUTE, Array, Control, Slot, State, namespace, relative_l1, settle
from hasten.passes.steps.retained import Retained
from hasten.passes.steps.schedules import Mask


@dataclass(frozen=True)
class FirstBlock:
    """``at_threshold``: a distance equal to the threshold is a ``reuse`` (diffusers) or a ``compute`` (cache-dit).

    ``cached``: most reuses in a run, negative for any number; ``limit`` is the most in a row. ``schedule``: calls that
    it computes are computed, the others are left to the distance (cache-dit's dynamic step masks).
    """

    threshold: float
    limit: int = -1
    cached: int = -1
    at_threshold: str = "reuse"
    retained: Retained = field(default_factory=Retained)
    schedule: Mask | None = None
    name: ClassVar[str] = "first-block"
    signal: ClassVar[str] = "probe"
    tap: ClassVar[str] = ""

    def slots(self) -> Mapping[str, Slot]:
        slots = {"reference": Slot(like="signal"), "count": Slot(dtype="int64")}
        return slots if self.cached < 0 else {**slots, "reused": Slot(dtype="int64")}

    def decide(self, state: State, signal: Array, control: Control) -> tuple[State, Array]:
        following, compute = self.judge(state, relative_l1(signal, state["reference"]), control)
        reference = namespace(signal).where(compute, signal, state["reference"])
        return {**following, "reference": reference}, compute

    def judge(self, state: State, distance: Array, control: Control) -> tuple[State, Array]:
        """Decide on a distance that is known: a 0-d float32. Returns all of the state but ``reference``."""
        xp = namespace(distance, *control)
        near = distance <= control.threshold if self.at_threshold == "reuse" else distance < control.threshold
        reuse = near & xp.isfinite(distance) & (control.threshold > 0)
        following = {}
        if self.cached >= 0:
            before = xp.where(control.step == 0, xp.zeros_like(state["reused"]), state["reused"])
            reuse = reuse & (before < self.cached)
        compute, following["count"] = settle(~reuse | self.retained.wanted(control), state["count"], control)
        if self.cached >= 0:
            following["reused"] = xp.where(compute, before, before + 1)
        return following, compute

    def observe(self, state: State, tap: Array | None, before: Array, after: Array, control: Control) -> State:
        return state

    def forced(self, steps: int) -> npt.NDArray[np.int64]:
        calls = self.retained.calls(steps)
        return calls if self.schedule is None else np.where(self.schedule.mask(steps), COMPUTE, calls)

    def mask(self, steps: int) -> npt.NDArray[np.bool_] | None:
        return None
