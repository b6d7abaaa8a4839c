"""The spellings of GroupNorm itself, for `hasten.passes.rules.group_norm_act`.

- one operator: torch, ATen, ``native_group_norm``, GroupNormalization 21 (18 once `canonical` made it per channel);
- Reshape to (B, G, -1), InstanceNormalization, Reshape back, Mul, Add: the torch exporter below opset 21. An affine
  inside the instance norm is per group; it is taken where it is one and zero, folded where it is constant;
- mean, variance, subtraction and (reciprocal) square root over a map reshaped to (B, G, …): decompositions and old
  exporters;
- ONNX's own function body: the variance from moments, reshapes in two steps, the affine on (B, C, L).

Each ends with ``x``, ``weight`` and ``bias`` (absent, (C,), or one number a channel with axes of one), ``groups``,
``eps``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hasten.passes.pattern import As, Checked, Const, GraphView, Match, OneOf, Op, Pattern, Var, scalar

_OPERATOR = Op(
    "group_norm", (Var("x"), Var("weight", optional=True), Var("bias", optional=True)), binds=("groups", "eps")
)
_GROUPED = As("grouped", Op("reshape", (Var("x"),)))
_INSTANCE = Op(
    "reshape",
    (
        Op(
            "instance_norm",
            (_GROUPED, Var("inner_weight", optional=True), Var("inner_bias", optional=True)),
            binds=("eps",),
        ),
    ),
)


def _normalised(grouped: Pattern) -> OneOf:
    """``(g - mean g) / sqrt(var g + epsilon)``."""
    mean = Op("mean", (grouped,), attrs=(("keepdims", True),), binds=("axes",))
    centred = Op("sub", (grouped, mean))

    def spread(keepdims: bool) -> OneOf:
        kept = (("keepdims", keepdims),)

        def mean_of(squares: Op) -> Op:
            return Op("mean", (squares,), attrs=kept, binds=("axes",))

        return OneOf(
            (
                ("var", Op("var", (grouped,), attrs=(("correction", 0), *kept), binds=("axes",))),
                ("product", mean_of(Op("mul", (centred, centred)))),
                ("power", mean_of(Op("pow", (centred, Const(2.0))))),
                ("square", mean_of(Op("square", (centred,)))),
                ("moments", Op("sub", (mean_of(Op("mul", (grouped, grouped))), Op("mul", (mean, mean))))),
            )
        )

    variance = As("spread", OneOf((("kept", spread(True)), ("restored", Op("reshape", (spread(False),))))))
    shifted = Op("add", (variance, Var("epsilon")))
    return OneOf(
        (
            ("rsqrt", Op("mul", (centred, Op("rsqrt", (shifted,))))),
            ("sqrt", Op("div", (centred, Op("sqrt", (shifted,))))),
            ("reciprocal", Op("mul", (centred, Op("reciprocal", (Op("sqrt", (shifted,)),))))),
            ("quotient", Op("mul", (centred, Op("div", (Const(1.0), Op("sqrt", (shifted,))))))),
            ("power", Op("mul", (centred, Op("pow", (shifted, Const(-0.5)))))),
        )
    )


_CHAIN = Op("reshape", (_normalised(_GROUPED),))
_TWICE = As("grouped", Op("reshape", (Op("reshape", (Var("x"),)),)))
_BODY = Op("reshape", (Op("reshape", (_normalised(_TWICE),)),))
_FLAT = Op("reshape", (Op("add", (Op("mul", (_BODY, Var("weight"))), Var("bias"))),))


def _bind_groups(view: GraphView[Any], found: Match[Any]) -> str | None:
    """(B, C, *spatial) seen as (B, G, …): the second axis of the reshaped map is the number of groups."""
    shape, grouped = view.shape(found["x"]), view.shape(found["grouped"])
    if shape is None or grouped is None or len(shape) < 3 or len(grouped) < 3:
        return f"a map of shape {shape} reshaped to {grouped} is not a group norm's"
    if shape[0] != grouped[0] or not isinstance(grouped[1], int) or not isinstance(shape[1], int):
        return f"a map of shape {shape} reshaped to {grouped}: the groups cannot be told"
    if shape[1] % grouped[1]:
        return f"{shape[1]} channels reshaped to {grouped}: the groups are not of whole channels"
    found.attrs["groups"] = grouped[1]
    return None


def _bind_chain(view: GraphView[Any], found: Match[Any]) -> str | None:
    grouped, epsilon = view.shape(found["grouped"]), scalar(view, found["epsilon"])
    if epsilon is None:
        return "what is added to the variance is not a constant"
    if grouped is None or tuple(found.attrs["axes"]) != tuple(range(2, len(grouped))):
        return f"the statistics are over axes {found.attrs['axes']} of {grouped}, not over all but the first two"
    if view.shape(found["spread"]) != (*grouped[:2], *(1 for _ in grouped[2:])):
        return f"the variance has shape {view.shape(found['spread'])}, not one number a group of {grouped}"
    found.attrs["eps"] = epsilon
    return _bind_groups(view, found)


def _trivial_inner(view: GraphView[Any], found: Match[Any]) -> str | None:
    weight, bias = found.values.get("inner_weight"), found.values.get("inner_bias")
    if weight is not None and scalar(view, weight, filled=True) != 1:
        return "the instance norm has a scale of its own"
    if bias is not None and scalar(view, bias, filled=True) != 0:
        return "the instance norm has a shift of its own"
    return None


def _per_channel(view: GraphView[Any], found: Match[Any]) -> str | None:
    """The affine's factors are (C, 1, …) or (1, C, 1, …)."""
    shape = view.shape(found["x"])
    for name in ("weight", "bias"):
        got = view.shape(value) if (value := found.values.get(name)) is not None else None
        if value is None:
            continue
        if shape is None or got is None:
            return f"the {name}'s shape is unknown"
        padded = (1,) * (len(shape) - len(got)) + got
        if len(padded) != len(shape) or padded[1] != shape[1] or any(d != 1 for d in (padded[0], *padded[2:])):
            return f"the {name} has shape {got}, not one number a channel of {shape}"
    return None


def _flat_affine(view: GraphView[Any], found: Match[Any]) -> str | None:
    """The affine is applied to the map seen as (B, C, L), which then gets its own shape back."""
    shape, result = view.shape(found["x"]), view.shape(found["result"])
    if shape is None or shape != result:
        return f"the result has shape {result}, not {shape}"
    for name in ("weight", "bias"):
        got = view.shape(found[name])
        if got is None or (1,) * (3 - len(got)) + got != (1, shape[1], 1):
            return f"the {name} has shape {got}, not one number a channel"
    return _bind_chain(view, found)


def _bind_instance(view: GraphView[Any], found: Match[Any]) -> str | None:
    return _trivial_inner(view, found) or _bind_groups(view, found)


def _bind_folded(view: GraphView[Any], found: Match[Any]) -> str | None:
    """A constant affine inside the instance norm goes into the outer one: w(su + t) + b = (ws)u + (wt + b)."""
    if (why := _bind_groups(view, found) or _per_channel(view, found)) is not None:
        return why
    shape, groups = view.shape(found["x"]), int(found.attrs["groups"])
    assert shape is not None
    inner = [
        view.constant(v) if (v := found.values.get(n)) is not None else None for n in ("inner_weight", "inner_bias")
    ]
    outer = [view.constant(v) if (v := found.values.get(n)) is not None else None for n in ("weight", "bias")]
    if inner[0] is None or inner[1] is None:
        return "the instance norm has an affine of its own that is not constant"
    if any(o is None and found.values.get(n) is not None for o, n in zip(outer, ("weight", "bias"), strict=True)):
        return "the group norm's affine is not constant, and the instance norm has one of its own"
    repeat = int(shape[1]) // groups
    scale, shift = (np.repeat(i.reshape(-1), repeat) for i in inner if i is not None)
    weight = np.ones_like(scale) if outer[0] is None else outer[0].reshape(-1)
    bias = np.zeros_like(scale) if outer[1] is None else outer[1].reshape(-1)
    found.attrs["folded"] = (weight * scale, weight * shift + bias)
    return None


def _affine(norm: Pattern) -> OneOf:
    weight, bias = Var("weight"), Var("bias")
    return OneOf(
        (
            ("affine", Checked(Op("add", (Op("mul", (norm, weight)), bias)), _per_channel)),
            ("weight", Checked(Op("mul", (norm, weight)), _per_channel)),
            ("none", norm),
        )
    )


NORM = OneOf(
    (
        ("operator", _OPERATOR),
        ("instance", _affine(Checked(_INSTANCE, _bind_instance))),
        ("instance-folded", Checked(_affine(_INSTANCE), _bind_folded)),
        ("chain", _affine(Checked(_CHAIN, _bind_chain))),
        ("body", Checked(As("result", _FLAT), _flat_affine)),
    ),
    name="norm",
)
"""Matches a GroupNorm however it is written."""
