"""GroupNorm, an optional scale and shift, an optional activation -> ``group_norm_act``.

``y = act((norm(x) * weight + bias) * scale + shift)`` (Wu & He, 1803.08494), group statistics in float32.
Activations: SiLU as one node, ``y*sigmoid(y)`` or ``y/(1+exp(-y))``; GELU of both kinds; quick-GELU ``y*sigmoid(1.702
y)``; none. The spellings of the norm itself are in `hasten.passes.rules.group_norm`. Left alone: a norm whose result
somebody else reads keeps its activation outside; a factor that is not per channel.
"""

from __future__ import annotations

from typing import Any

from hasten.passes.pattern import Checked, Const, GraphView, Match, OneOf, Op, Pattern, Var
from hasten.passes.rule import Rule
from hasten.passes.rules.group_norm import NORM
from hasten.passes.rules.norm_operands import OPERANDS


def _modulates(view: GraphView[Any], found: Match[Any]) -> str | None:
    """Scale and shift are (B, C, 1, …): one number a picture and channel."""
    shape = view.shape(found["x"])
    for name in ("scale", "shift"):
        got = view.shape(found[name])
        if shape is None or got is None or not _fits(got, shape):
            return f"the {name} has shape {got}, not one number a picture and channel of {shape}"
    return None


def _fits(got: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
    return len(got) == len(shape) and got[0] in (1, shape[0]) and got[1] == shape[1] and all(d == 1 for d in got[2:])


_Y = OneOf(
    (
        ("scale-shift", Checked(Op("add", (Op("mul", (NORM, Var("scale"))), Var("shift"))), _modulates)),
        ("plain", NORM),
    )
)
_ACTIVATIONS: tuple[tuple[str, Pattern], ...] = (
    ("silu", Op("silu", (_Y,))),
    ("silu", Op("mul", (_Y, Op("sigmoid", (_Y,))))),
    ("silu", Op("div", (_Y, Op("add", (Op("exp", (Op("neg", (_Y,)),)), Const(1.0)))))),
    ("gelu", Op("gelu", (_Y,), attrs=(("approximate", "none"),))),
    ("gelu_tanh", Op("gelu", (_Y,), attrs=(("approximate", "tanh"),))),
    ("quick_gelu", Op("mul", (_Y, Op("sigmoid", (Op("mul", (_Y, Const(1.702))),))))),
    ("none", _Y),
)


def _guard(view: GraphView[Any], found: Match[Any]) -> str | None:
    shape, groups = view.shape(found["x"]), found.attrs["groups"]
    if shape is None or len(shape) < 2 or not isinstance(shape[1], int):
        return f"the input's shape {shape} does not tell the number of channels"
    return f"{shape[1]} channels do not divide into {groups} groups" if shape[1] % groups else None


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    def vector(name: str) -> Any:
        value = found.values.get(name)
        shape = view.shape(value) if value is not None else None
        if value is None or shape is None or len(shape) == 1:
            return value
        return view.emit("reshape", [value], {"shape": (-1,)}, at=root)

    operands = {name: found.values.get(name) for name in OPERANDS}
    if "folded" in found.attrs:
        affine = [view.emit_constant(c, at=root) for c in found.attrs["folded"]]
    else:
        affine = [vector("weight"), vector("bias")]
    operands |= zip(("weight", "bias"), affine, strict=True)
    x = found["x"]
    if (wanted := view.dtype(root)) is not None and wanted != view.dtype(x):  # autocast's norms are float32 on a GPU
        x = view.emit("cast", [x], {"to": wanted}, at=root)
    inputs = [x, *operands.values()]
    attrs = {"groups": int(found.attrs["groups"]), "eps": float(found.attrs["eps"]), "act": found.tags["act"]}
    return view.emit("group_norm_act", inputs, attrs, at=root)


GROUP_NORM_ACT = Rule(
    name="group-norm-act",
    spellings=(("norm", OneOf(_ACTIVATIONS, name="act")),),
    guard=_guard,
    replace=_replace,
    anchors=frozenset({"group_norm", "instance_norm", "var"}),
    variant=lambda found: found.tags["act"],
)
