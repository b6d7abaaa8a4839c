"""ONNX Runtime's own operators (domain com.microsoft) in standard ones, for targets that have no kernel for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx import helper

from hasten.passes.onnx import functions
from hasten.passes.onnx.inline import copy_nodes
from hasten.passes.onnx.lowering import Left, Lowered, attributes, operands

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView
    from hasten.passes.pipeline import Context


def _activated(view: OnnxView, x: Any, act: str, at: str) -> str:
    """An activation spelled as the opset allows, in the operand's own type."""
    body = functions.Body(view.opset)
    last = body.activation("X", act, view.dtype(x) or "float32")
    body.nodes.append(helper.make_node("Identity", [last], ["Y"]))
    opsets = [helper.make_opsetid("", view.opset)]
    return copy_nodes(view, helper.make_function("hasten", "Body", ["X"], ["Y"], body.nodes, opsets), [x], at=at)


def _gelu(act: str) -> Any:
    def lowering(view: OnnxView, value: str, context: Context) -> Lowered | Left:
        x, *bias = operands(view, value)
        if bias and bias[0] is not None:
            x = view.emit("add", [x, bias[0]], {}, at=value)
        return Lowered(value, _activated(view, x, act, value))

    return lowering


def quick_gelu(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """``x * sigmoid(alpha x)``."""
    (x,), alpha = operands(view, value), attributes(view, value).get("alpha", 1.702)
    inner = x
    if alpha != 1.0:
        number = functions.scalar(alpha, view.dtype(str(x)) or "float32")
        inner = view.emit("mul", [x, view.emit_constant(number, at=value)], {}, at=value)
    return Lowered(value, view.emit("mul", [x, view.node_at("Sigmoid", [inner], {}, at=value)], {}, at=value))


def group_norm(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """X (B, H, W, C), or (B, C, H, W) where ``channels_last`` is 0, with an optional SiLU."""
    (x, weight, bias), attrs = operands(view, value), attributes(view, value)
    last = attrs.get("channels_last", 1)
    if last:
        x = view.emit("transpose", [x], {"perm": (0, 3, 1, 2)}, at=value)
    act = "silu" if attrs.get("activation", 0) else "none"
    fused = {"groups": attrs["groups"], "eps": attrs.get("epsilon", 1e-5), "act": act}
    y = view.emit("group_norm_act", [x, weight, bias, None, None], fused, at=value)
    return Lowered(value, view.emit("transpose", [y], {"perm": (0, 2, 3, 1)}, at=value) if last else y)


def bias_split_gelu(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """(B, N, 2C) plus a bias, then GEGLU."""
    x = view.emit("add", operands(view, value), {}, at=value)
    return Lowered(value, view.emit("geglu", [x], {"approximate": "none", "gate_first": False}, at=value))


def bias_add(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """X + bias + skip."""
    x, bias, skip = operands(view, value)
    return Lowered(value, view.emit("add", [view.emit("add", [x, bias], {}, at=value), skip], {}, at=value))


WITHOUT_CPU_KERNEL = {
    "com.microsoft.GroupNorm": group_norm,
    "com.microsoft.BiasSplitGelu": bias_split_gelu,
    "com.microsoft.BiasAdd": bias_add,
}
"""Operators that ONNX Runtime has a CUDA kernel for only."""

WITHOUT_IMPORTER = {
    **WITHOUT_CPU_KERNEL,
    "com.microsoft.FastGelu": _gelu("gelu_tanh"),
    "com.microsoft.BiasGelu": _gelu("gelu"),
    "com.microsoft.QuickGelu": quick_gelu,
}
"""Operators that TensorRT's parser does not know."""
