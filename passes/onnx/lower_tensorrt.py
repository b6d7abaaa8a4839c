"""What TensorRT and TensorRT-RTX get: standard operators in the model's own element types.

Their parser has few contrib operators; GroupNormalization, Reshape+InstanceNormalization and Gelu are fused as they
are. The attention layer cannot stand in If, Loop or Scan, in float32 or with heads wider than 256; spelled out as
MatMul, Softmax, MatMul it is compiled to the same kernel (found by building engines with TensorRT-RTX 1.7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.passes.onnx import contrib
from hasten.passes.onnx.inline import inline
from hasten.passes.onnx.lowering import Left, Lowered, attributes, operands

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView
    from hasten.passes.pipeline import Context

WIDEST_HEAD = 256


def spelled(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """The fused operator's body in standard operators, in place."""
    return Lowered(value, inline(view, value, native=True))


def attention(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """The Attention operator where the layer can stand, else spelled out."""
    q, k, v, *mask = operands(view, value)
    if view.opset < 23 or _no_layer(view, value, str(q), context):
        return spelled(view, value, context)
    attrs = attributes(view, value)
    written = {"scale": float(attrs["scale"]), "is_causal": int(attrs["causal"])}
    return Lowered(value, view.node_at("Attention", [q, k, v, *mask], written, at=value))


def standard_attention(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """An arriving Attention operator that the layer cannot be made of."""
    op = view.op(value)
    if op is None or op.name != "sdpa":
        return Left("has a cache, a soft cap, merged heads or unknown shapes, which are not spelled out")
    q = str(op.inputs[0])
    if not _no_layer(view, value, q, context):
        return Left("the attention layer is made of it")
    width, scale = (view.shape(q) or (None,))[-1], op.attrs["scale"]
    if scale is None and not isinstance(width, int):
        return Left("the scale is 1/sqrt(width), and the width is not static")
    attrs = {"scale": width**-0.5 if scale is None and isinstance(width, int) else scale, "causal": op.attrs["causal"]}
    fused = view.emit("attention", list(op.inputs), attrs, at=value)
    return Lowered(value, inline(view, fused, native=True))


def _no_layer(view: OnnxView, value: str, q: str, context: Context) -> bool:
    dtype, width = view.dtype(value), (view.shape(q) or (None,))[-1]
    if dtype not in ("float16", "bfloat16") or not isinstance(width, int) or width > WIDEST_HEAD:
        return True
    return context.supports("Attention", dtype, in_control_flow=view.scope.in_control_flow) is not None


TENSORRT = {
    "hasten.Attention": attention,
    "hasten.GroupNormAct": spelled,
    "hasten.Gelu": spelled,
    "hasten.Geglu": spelled,
    "hasten.UpsampleConv2d": spelled,
    "Attention": standard_attention,
    **contrib.WITHOUT_IMPORTER,
}
"""Operator -> how it is written for TensorRT."""
