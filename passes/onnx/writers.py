"""What stands for a neutral operator in an ONNX graph: one table, `WRITE`. Plain names are standard operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from hasten.passes.onnx.element import type_of

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView

Writer = Callable[["OnnxView", list[Any], dict[str, Any], str], str]


def _plain(op: str) -> Writer:
    def writer(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
        return view.node_at(op, inputs, {}, at=at)

    return writer


def _fused(op: str, *names: str) -> Writer:
    def writer(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
        written = {n: int(v) if isinstance(v := attrs[n], bool) else v for n in names}
        return view.node_at(op, inputs, written, at=at, domain="hasten")

    return writer


def _write_gelu(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    domain = "" if view.opset >= 20 else "hasten"
    return view.node_at("Gelu", inputs, {"approximate": attrs["approximate"]}, at=at, domain=domain)


def _write_cast(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    return view.node_at("Cast", inputs, {"to": type_of(attrs["to"])}, at=at)


def _write_transpose(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    """A transpose; of a transpose, one of both, or nothing."""
    source, perm = inputs[0], tuple(attrs["perm"])
    below = view.op(source)
    if below is not None and below.name == "transpose" and below.inputs[0] is not None:
        source, perm = below.inputs[0], tuple(below.attrs["perm"][axis] for axis in perm)
    if perm == tuple(range(len(perm))):
        return source
    return view.node_at("Transpose", [source], {"perm": list(perm)}, at=at)


def _with_axes(op: str, since: int) -> Writer:
    """An operator whose axes are an operand since opset ``since``."""

    def writer(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
        axes = [int(a) for a in attrs["axes"]]
        if view.opset < since:
            return view.node_at(op, inputs, {"axes": axes}, at=at)
        return view.node_at(op, [*inputs, view.emit_constant(np.asarray(axes, dtype=np.int64), at=at)], {}, at=at)

    return writer


def _write_reshape(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    """``shape`` is a tuple of sizes; a name of a symbolic size takes the place of the one -1 that ONNX allows."""
    shape = [d if isinstance(d, int) else -1 for d in attrs["shape"]]
    content = view.constant(inputs[0])
    if content is not None and shape.count(-1) <= 1 and 0 not in shape:
        return view.emit_constant(content.reshape(shape), at=at)
    return view.node_at("Reshape", [inputs[0], view.emit_constant(np.asarray(shape, dtype=np.int64), at=at)], {}, at=at)


def _write_any(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    """Whether any element of bool axes is true; ReduceMax takes small integers since opset 12, bool since 20."""
    axes = [int(a) for a in attrs["axes"]]
    numbers = view.node_at("Cast", inputs, {"to": onnx.TensorProto.INT32}, at=at)
    keepdims = int(bool(attrs.get("keepdims", False)))
    if view.opset < 18:
        largest = view.node_at("ReduceMax", [numbers], {"axes": axes, "keepdims": keepdims}, at=at)
    else:
        listed = view.emit_constant(np.asarray(axes, dtype=np.int64), at=at)
        largest = view.node_at("ReduceMax", [numbers, listed], {"keepdims": keepdims}, at=at)
    return view.node_at("Cast", [largest], {"to": onnx.TensorProto.BOOL}, at=at)


def _write_conv(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    names = {"strides": "stride", "pads": "padding", "dilations": "dilation"}
    written = {onnx_name: list(attrs[name]) for onnx_name, name in names.items()}
    return view.node_at("Conv", inputs, {**written, "group": attrs["groups"]}, at=at)


def _write_linear(view: OnnxView, inputs: list[Any], attrs: dict[str, Any], at: str) -> str:
    return view.node_at("Gemm", inputs, {"transB": int(attrs["out_axis"] == 0)}, at=at)


WRITE: dict[str, Writer] = {
    "group_norm_act": _fused("GroupNormAct", "groups", "eps", "act"),
    "geglu": _fused("Geglu", "approximate", "gate_first"),
    "attention": _fused("Attention", "scale", "causal"),
    "upsample_conv2d": _fused("UpsampleConv2d"),
    "gelu": _write_gelu,
    "conv1d": _write_conv, "conv2d": _write_conv, "conv3d": _write_conv, "linear": _write_linear,
    "matmul": _plain("MatMul"),
    "add": _plain("Add"), "sub": _plain("Sub"), "mul": _plain("Mul"), "div": _plain("Div"),
    "where": _plain("Where"), "logical_not": _plain("Not"), "logical_and": _plain("And"), "logical_or": _plain("Or"),
    "any": _write_any, "cast": _write_cast, "transpose": _write_transpose,
    "unsqueeze": _with_axes("Unsqueeze", 13), "squeeze": _with_axes("Squeeze", 13), "reshape": _write_reshape,
}  # fmt: skip
"""Neutral operator -> how it is written."""
