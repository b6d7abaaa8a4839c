"""Schedules: decisions that depend on nothing but the number of the call, so that they are known before a run.

A run of one or two calls computes them all where the schedule was made for more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.passes.steps.policy import Array, Control, Slot, State, namespace, settle
from hasten.passes.steps.retained import control_at

STRETCH = ("refuse", "nearest")
Bits = npt.NDArray[np.bool_]


class Schedule:
    """What all schedules share. Left to itself a call asks `wanted`; a caller who knows the mask forces it."""

    name: ClassVar[str]
    signal: ClassVar[str] = ""
    tap: ClassVar[str] = ""
    threshold = 0.0
    limit = -1

    def slots(self) -> Mapping[str, Slot]:
        return {}

    def wanted(self, control: Control) -> Array:
        """Whether the call computes where the caller does not say: it does, unless a rule without memory says no."""
        return control.step >= 0

    def decide(self, state: State, signal: Array | None, control: Control) -> tuple[State, Array]:
        count = namespace(*control).zeros_like(control.step)
        return {}, settle(self.wanted(control), count, control)[0]

    def observe(self, state: State, tap: Array | None, before: Array, after: Array, control: Control) -> State:
        return state

    def mask(self, steps: int) -> Bits:
        raise NotImplementedError

    def forced(self, steps: int) -> npt.NDArray[np.int64]:
        return self.mask(steps).astype(np.int64)


@dataclass(frozen=True)
class Mask(Schedule):
    """``bits``: one character a call, 1 computes. ``stretch``: what happens in a run of another length.

    ``refuse`` raises `UsageError`; ``nearest`` takes for each call the bit at the nearest relative position. The first
    call computes in any case.
    """

    bits: str
    stretch: str = "refuse"
    name: ClassVar[str] = "mask"

    def mask(self, steps: int) -> Bits:
        bits = np.array([b == "1" for b in self.bits])
        if steps != len(bits):
            if steps <= 2:
                return np.ones(steps, bool)
            if self.stretch == "refuse":
                raise UsageError(
                    f"mask: it was made for {len(bits)} steps and the run has {steps}; give a mask of {steps}, or "
                    "stretch=nearest"
                )
            bits = bits[np.rint(np.arange(steps) * (len(bits) - 1) / (steps - 1)).astype(int)]
        bits[0] = True
        return bits


@dataclass(frozen=True)
class Interval(Schedule):
    """Every ``interval``-th call: FORA (Selvaraju et al., 2407.01425), DeepCache, TaylorSeer.

    The first ``warmup`` calls and the last ``last`` compute; between, call n does where ``n - warmup - offset`` is a
    multiple of the interval. diffusers' TaylorSeer has ``offset=1``. From call ``after`` on, where given, all compute.
    """

    interval: int
    warmup: int = 0
    offset: int = 0
    last: int = 0
    after: int | None = None
    name: ClassVar[str] = "interval"

    def wanted(self, control: Control) -> Array:
        on = (control.step - (self.warmup + self.offset)) % self.interval == 0
        wanted = on | (control.step < self.warmup)
        if self.last:
            wanted = wanted | ((control.steps > 0) & (control.step >= control.steps - self.last))
        return wanted if self.after is None else wanted | (control.step >= self.after)

    def mask(self, steps: int) -> Bits:
        return np.array([n == 0 or bool(self.wanted(control_at(n, steps))) for n in range(steps)], bool)


@dataclass(frozen=True)
class Windows(Schedule):
    """Windows that grow: Spectrum's schedule (CVPR 2026).

    After ``warmup`` calls one in ``floor(window)`` computes, and ``window`` grows by ``flex`` with each that does.
    """

    window: float = 2.0
    flex: float = 0.75
    warmup: int = 5
    name: ClassVar[str] = "windows"

    def mask(self, steps: int) -> Bits:
        window, reused, bits = self.window, 0, []
        for step in range(steps):
            compute = step < max(1, self.warmup) or (reused + 1) % max(1, math.floor(window)) == 0
            if compute and step >= self.warmup:
                # Sums of flex such as 0.1 must reach the next whole number where they do on paper.
                window = round(window + self.flex, 6)
            reused = 0 if compute else reused + 1
            bits.append(compute)
        return np.array(bits, bool)


def bits_of_steps(computed: Iterable[int], steps: int) -> str:
    """The mask of a run of ``steps`` calls from the numbers of those that compute (MeanCache, LeMiCa, BudCache)."""
    wanted = set(computed)
    if outside := sorted(n for n in wanted if not 0 <= n < steps):
        raise UsageError(f"computed: step {outside[0]} is not in a run of {steps}; give numbers from 0 to {steps - 1}")
    return "".join("1" if n == 0 or n in wanted else "0" for n in range(steps))


def bits_of_bins(computes: Sequence[int], reuses: Sequence[int]) -> str:
    """The mask of cache-dit's bins: computes[0] calls compute, reuses[0] reuse, computes[1] compute, and so on."""
    if len(computes) - len(reuses) not in (0, 1):
        raise UsageError(
            f"bins: {len(computes)} of computed steps and {len(reuses)} of reused ones given; "
            "they take turns, computed ones first"
        )
    turns = [n for pair in zip(computes, (*reuses, 0), strict=False) for n in pair]
    return "".join(str((i + 1) % 2) * n for i, n in enumerate(turns))
