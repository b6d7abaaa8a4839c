"""How the fused operators read as neutral ones, for the passes that choose their implementations."""

from __future__ import annotations

from typing import Any

from hasten.passes.fx.call import Call, Row
from hasten.passes.pattern import OpView
from hasten.passes.rules.norm_operands import OPERANDS


def _attention(call: Call) -> OpView[Any] | None:
    operands = tuple(call.value(name) for name in ("q", "k", "v"))
    attrs = {"scale": call.raw("scale"), "causal": call.raw("causal")}
    return None if None in operands else OpView("attention", (*operands, call.value("mask")), attrs)


def _group_norm_act(call: Call) -> OpView[Any] | None:
    x = call.value("x")
    if x is None:
        return None
    attrs = {"norm_groups": call.raw("groups", 32), "norm_eps": call.raw("eps", 1e-5), "norm_act": call.raw("act")}
    operands = (x, *(call.value(name) for name in OPERANDS))
    return OpView("group_norm_act", operands, attrs)


def _upsample_conv2d(call: Call) -> OpView[Any] | None:
    operands = tuple(call.value(name) for name in ("x", "weight"))
    return None if None in operands else OpView("upsample_conv2d", (*operands, call.value("bias")))


OWN: dict[str, Row] = {
    "hasten.attention": Row(("q", "k", "v", "mask", "scale", "causal"), _attention),
    "hasten.group_norm_act": Row(("x", *OPERANDS, "groups", "eps", "act"), _group_norm_act),
    "hasten.upsample_conv2d": Row(("x", "weight", "bias"), _upsample_conv2d),
}
"""Rows of `passes.fx.tables.READ`."""
