"""A fused operator's body written into the graph in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper

from hasten.passes.onnx import export, functions

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView


def inline(view: OnnxView, value: str, *, native: bool) -> str:
    """Write the body of the fused node that makes ``value``; ``native``: in its own element type, not in float32."""
    node = view.node(value)
    signature = replace(export.signature(node), native=native)
    attrs = {a.name: functions.plain(helper.get_attribute_value(a)) for a in node.template.attribute}
    body = functions.write(node.op, attrs, signature, view.opset)
    operands = [t.name or None for t in node.inputs]
    return copy_nodes(view, body, operands, at=value)


def copy_nodes(view: OnnxView, body: onnx.FunctionProto, operands: list[str | None], *, at: str) -> str:
    """Write a function's nodes before the node that makes ``at``; what is constant becomes one. Returns the result."""
    names: dict[str, Any] = dict.fromkeys(body.input)
    names.update(zip(body.input, operands, strict=False))
    for proto in body.node:
        if proto.op_type == "Identity" and proto.output[0] == body.output[0]:
            return str(names[proto.input[0]])
        if proto.op_type == "Constant":
            content = onnx.numpy_helper.to_array(proto.attribute[0].t)
            names[proto.output[0]] = view.emit_constant(content, at=at)
            continue
        attrs = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        if proto.op_type == "Transpose":
            names[proto.output[0]] = view.emit("transpose", [names[proto.input[0]]], {"perm": attrs["perm"]}, at=at)
            continue
        inputs = [names[i] if i else None for i in proto.input]
        first = view.node_at(proto.op_type, inputs, attrs, at=at, domain=proto.domain, outputs=len(proto.output))
        made = [t.name for t in view.node(first).outputs]
        for name, output in zip(proto.output, made, strict=True):
            content = view.constant(output) if len(made) == 1 else None
            names[name] = output if content is None else view.emit_constant(content, at=at)
    raise AssertionError("a body ends in an Identity")
