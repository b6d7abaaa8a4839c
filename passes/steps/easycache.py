"""EasyCache: decides on the model's input and output alone, so it needs nothing of the model's inside.

Between the last two computed calls the output changed ``slope = mean|y_c - y_c'| / mean|x_c - x_c'|`` times as much as
the input. Each call adds ``slope * mean|x_n - x_{n-1}| / mean|y_c|`` to an error, and reuses ``x_n + (y_c - x_c)``
while the error is below the threshold. Zhou et al., 2507.02860; H-EmbodVis/EasyCache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hasten.passes.steps.policy import (
    Array,
    Control,
    Slot,
    State,
    as_float32,
    mean_abs,
    namespace,
    ratio,
    settle,
)
from hasten.passes.steps.retained import Retained


@dataclass(frozen=True)
class EasyCache:
    """The region is the whole model: ``before`` its input, ``after`` its output."""

    threshold: float
    limit: int = -1
    retained: Retained = field(default_factory=lambda: Retained(first=5, last=1))
    name: ClassVar[str] = "easycache"
    signal: ClassVar[str] = "input"
    tap: ClassVar[str] = ""

    def slots(self) -> Mapping[str, Slot]:
        return {
            "previous": Slot(like="signal"),
            "error": Slot(dtype="float32"),
            "slope": Slot(dtype="float32"),
            "size": Slot(dtype="float32"),
            "held_input": Slot(like="before"),
            "held_output": Slot(like="after"),
            "count": Slot(dtype="int64"),
        }

    def decide(self, state: State, signal: Array, control: Control) -> tuple[State, Array]:
        xp = namespace(signal, *control)
        moved = mean_abs(as_float32(signal) - as_float32(state["previous"]))
        error = state["error"] + ratio(state["slope"] * moved, state["size"])
        reuse = (error < control.threshold) & xp.isfinite(error) & (control.threshold > 0)
        compute, count = settle(~reuse | self.retained.wanted(control), state["count"], control)
        return {
            **state,
            "previous": signal,
            "error": xp.where(compute, xp.zeros_like(error), error),
            "count": count,
        }, compute

    def observe(self, state: State, tap: Array | None, before: Array, after: Array, control: Control) -> State:
        xp = namespace(before, after, *control)
        gained = mean_abs(as_float32(after) - as_float32(state["held_output"]))
        moved = mean_abs(as_float32(before) - as_float32(state["held_input"]))
        # One computed call has no slope, nor have two of which one is not finite; infinity makes the next one compute.
        known = (control.step > 0) & xp.isfinite(gained) & xp.isfinite(moved)
        slope = xp.where(known, ratio(gained, moved), xp.full_like(gained, float("inf")))
        return {**state, "slope": slope, "size": mean_abs(after), "held_input": before, "held_output": after}

    def forced(self, steps: int) -> npt.NDArray[np.int64]:
        return self.retained.calls(steps)

    def mask(self, steps: int) -> npt.NDArray[np.bool_] | None:
        return None
