"""TeaCache: a step computes when the signal's distances, mapped by a polynomial, have added up to a threshold.

``total += p(mean|s_n - s_{n-1}| / mean|s_{n-1}|)``; a step computes unless ``total < threshold``, and computing sets
the total to zero. The distance is from call to call, not from the last computed one. Liu et al., 2411.19108;
ali-vilab/TeaCache. Here, unlike there, a distance that is not finite, or beyond the range that the polynomial was
fitted on, computes, and steps are told by their number, never by the timestep's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hasten.passes.steps.policy import Array, Control, Slot, State, namespace, relative_l1, settle
from hasten.passes.steps.retained import Retained

SIGNS = ("signed", "abs", "clamp0")


@dataclass(frozen=True)
class TeaCache:
    """``coefficients`` of the polynomial, highest power first. ``sign``: what is added where it is negative.

    ``signed`` adds it as it is (the reference), ``abs`` its magnitude, ``clamp0`` nothing. ``strict``: a total equal to
    the threshold computes. ``fitted``: the largest distance that the polynomial was fitted on. ``signal``:
    ``modulated`` or ``time-embedding``. ``times``: the timesteps of the run, where they are known when an engine is
    built; what depends on them alone is then decided there.
    """

    coefficients: tuple[float, ...]
    threshold: float
    limit: int = -1
    sign: str = "signed"
    strict: bool = True
    fitted: float = float("inf")
    retained: Retained = field(default_factory=lambda: Retained(first=1, last=1))
    signal: str = "modulated"
    times: tuple[float, ...] = ()
    name: ClassVar[str] = "teacache"
    tap: ClassVar[str] = ""

    def slots(self) -> Mapping[str, Slot]:
        return {
            "previous": Slot(like="signal"),
            "total": Slot(dtype="float32"),
            "count": Slot(dtype="int64"),
        }

    def decide(self, state: State, signal: Array, control: Control) -> tuple[State, Array]:
        following, compute = self.judge(state, relative_l1(signal, state["previous"]), control)
        return {**following, "previous": signal}, compute

    def judge(self, state: State, distance: Array, control: Control) -> tuple[State, Array]:
        """Decide on a distance that is known: a 0-d float32. Returns all of the state but ``previous``."""
        xp = namespace(distance, *control)
        total = state["total"] + self.estimate(distance)
        below = total < control.threshold if self.strict else total <= control.threshold
        sound = xp.isfinite(distance) & xp.isfinite(total) & (distance <= self.fitted) & (control.threshold > 0)
        wanted = ~(below & sound) | self.retained.wanted(control)
        compute, count = settle(wanted, state["count"], control)
        return {"total": xp.where(compute, xp.zeros_like(total), total), "count": count}, compute

    def estimate(self, distance: Array) -> Array:
        """The change of the region's result that a distance of the signal stands for, by Horner's rule in float32."""
        xp = namespace(distance)
        value = xp.full_like(distance, self.coefficients[0])
        for coefficient in self.coefficients[1:]:
            value = value * distance + xp.full_like(distance, coefficient)
        if self.sign == "abs":
            return xp.abs(value)
        return xp.where(value < 0, xp.zeros_like(value), value) if self.sign == "clamp0" else value

    def observe(self, state: State, tap: Array | None, before: Array, after: Array, control: Control) -> State:
        return state

    def forced(self, steps: int) -> npt.NDArray[np.int64]:
        return self.retained.calls(steps)

    def mask(self, steps: int) -> npt.NDArray[np.bool_] | None:
        return None
