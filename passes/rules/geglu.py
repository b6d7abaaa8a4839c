"""GEGLU -> ``geglu``: the halves of the last axis, one times the GELU of the other (Shazeer, 2002.05202).

Met as ``chunk``/``split``/two slices, gate first or last, in either order of the product.
Left alone: halves of another axis, a split into more than two parts, halves of two different tensors.
"""

from __future__ import annotations

from typing import Any

from hasten.passes.pattern import GraphView, Match, OneOf, Op, Var
from hasten.passes.rule import Rule


def _half(index: int) -> Op:
    return Op("part", (Var("x"),), attrs=(("index", index), ("parts", 2)), binds=("axis",))


def _gated(gate: int) -> Op:
    return Op("mul", (_half(1 - gate), Op("gelu", (_half(gate),), binds=("approximate",))))


def _guard(view: GraphView[Any], found: Match[Any]) -> str | None:
    shape, axis = view.shape(found["x"]), found.attrs["axis"]
    if shape is None or axis != len(shape) - 1:
        return f"the halves are of axis {axis} of shape {shape}; only the last axis is fused"
    return None


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    attrs = {"approximate": found.attrs["approximate"], "gate_first": found.tags["gate"] == "first"}
    return view.emit("geglu", [found["x"]], attrs, at=root)


GEGLU = Rule(
    name="geglu",
    spellings=(("split-gelu-mul", OneOf((("last", _gated(1)), ("first", _gated(0))), name="gate")),),
    guard=_guard,
    replace=_replace,
    anchors=frozenset({"gelu"}),
)
