"""``group_norm_act`` as a part of larger sites: its operands, and the types that the C++ kernel takes."""

from __future__ import annotations

from typing import Any

from hasten.passes.pattern import GraphView, Match, Op, Var

OPERANDS = ("weight", "bias", "scale", "shift")
"""What may be given beside the map, in the operator's order."""


def pattern(prefix: str = "", *, rank: int | None = None) -> Op:
    """The operator on a map ``x``; its operands are bound as ``<prefix>weight`` and so on."""
    operands = (Var(f"{prefix}{name}", optional=True) for name in OPERANDS)
    return Op("group_norm_act", (Var("x", rank=rank), *operands), binds=("norm_groups", "norm_eps", "norm_act"))


def values(found: Match[Any], prefix: str = "") -> list[Any]:
    """The bound operands, in order, with None for those that are not there."""
    return [found.values[f"{prefix}{name}"] for name in OPERANDS]


def unfit(view: GraphView[Any], found: Match[Any], prefix: str = "") -> str | None:
    """Which operand the C++ kernel, which reads float32 only, cannot take."""
    for name, value in zip(OPERANDS, values(found, prefix), strict=True):
        if value is not None and view.dtype(value) != "float32":
            return f"the norm's {name} is {view.dtype(value)}, not float32"
    return None
