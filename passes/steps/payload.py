"""What a reused call returns: the last computed residual added to what comes in, or the last computed value.

Payloads that extrapolate are in `hasten.passes.steps.forecast`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hasten.passes.steps.policy import Array, Control, Slot, State


@dataclass(frozen=True)
class Residual:
    """``after = before + R`` with ``R = after_c - before_c`` of the last computed call c. Both have one shape."""

    name: ClassVar[str] = "residual"

    def slots(self) -> Mapping[str, Slot]:
        return {"residual": Slot(like="after")}

    def store(self, state: State, before: Array, after: Array, control: Control) -> State:
        return {"residual": after - before}

    def reuse(self, state: State, before: Array, control: Control) -> Array:
        return before + state["residual"]


@dataclass(frozen=True)
class Value:
    """``after = after_c`` of the last computed call c, whatever came in."""

    name: ClassVar[str] = "value"

    def slots(self) -> Mapping[str, Slot]:
        return {"value": Slot(like="after")}

    def store(self, state: State, before: Array, after: Array, control: Control) -> State:
        return {"value": after}

    def reuse(self, state: State, before: Array, control: Control) -> Array:
        return state["value"]
