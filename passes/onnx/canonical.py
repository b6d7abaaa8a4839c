"""`CANONICAL`: what exporters write around the computation, in one form, so that the rules see constants and four axes.

- values that depend on no input become constants: shape arithmetic over static sizes (the Shape, Gather, Div, Slice
  chains of the TorchScript exporter), small computations on constants;
- a Reshape whose target is computed, though at most one size of the result is unknown, gets a constant target;
- Attention on (B, N, H D) gets its heads apart: (B, H, N, D), as every other spelling has them.

Nothing is decomposed, no result changes, and a second run finds nothing. GroupNormalization 18 and ONNX Runtime's GELUs
need no rewriting: the view reads them as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.passes.onnx.graph import OnnxGraph, operator_name
from hasten.passes.onnx.tables import plain_attention
from hasten.passes.rule import RuleReport, Site

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView
    from hasten.passes.pipeline import Context

ROUNDS = 8
"""Folding lets inference find more static sizes, which fold more; a chain of exporters' making needs two or three."""
FUSED_ALREADY = (
    "com.microsoft.Attention",
    "com.microsoft.GroupQueryAttention",
    "com.microsoft.MultiHeadAttention",
    "com.microsoft.PackedMultiHeadAttention",
    "com.microsoft.SkipGroupNorm",
    "com.microsoft.SkipLayerNormalization",
    "com.microsoft.FusedConv",
    "com.microsoft.FusedMatMul",
    "com.microsoft.NhwcConv",
)
"""ONNX Runtime's own fused operators, which no rule takes apart."""


class Canonical:
    """The pass. One site a value."""

    name = "canonical"

    def run(self, graph: OnnxGraph, context: Context) -> RuleReport:
        graph.target = context.target
        for op, count in graph.op_counts().items():
            if op in FUSED_ALREADY:
                graph.notes.append(f"{count} {op} {'is' if count == 1 else 'are'} fused already and left as found")
        report = RuleReport(self.name)
        for _ in range(ROUNDS):
            found: list[Site] = []
            for view in graph.views():
                view.rule = self.name
                found += _sweep(view, context)
            if not found:
                break
            report += RuleReport(self.name, tuple(found))
            graph.clean()
        return report


def _sweep(view: OnnxView, context: Context) -> list[Site]:
    sites = []
    for value in list(view.values()):
        if context.fuel.spent:
            break
        if view.node(value) is None or view.uses(value) == 0:
            continue
        for variant, rewrite in (("fold", _fold), ("reshape", _constant_target), ("heads", _heads_apart)):
            where, new = view.where(value), rewrite(view, value)
            if new is not None:
                context.fuel.burn()
                sites.append(Site(where, variant))
                view.substitute(value, new)
                break
    return sites


def _fold(view: OnnxView, value: str) -> str | None:
    if view.node(value).op == "Constant" or value in view.scope.output_names:
        return None
    if any(user.op == "If" for user in view.tensor(value).outputs):
        return None  # runtimes inline the branch of an If whose condition is a constant, and check it more strictly
    content = view.constant(value)
    return None if content is None else view.emit_constant(content, at=value)


def _constant_target(view: OnnxView, value: str) -> str | None:
    """A target of static sizes, of 0 where the size is the input's, and of at most one -1."""
    node = view.node(value)
    if operator_name(node) != "Reshape" or node.attrs.get("allowzero", 0) or len(node.inputs) != 2:
        return None
    data, target = (t.name for t in node.inputs)
    before, after = view.shape(data), view.shape(value)
    if view.constant(target) is not None or before is None or after is None or 0 in after:
        return None
    wanted: list[Any] = list(after)
    for axis, size in enumerate(wanted):
        if not isinstance(size, int) and axis < len(before) and before[axis] == size:
            wanted[axis] = 0
    unknown = [axis for axis, size in enumerate(wanted) if not isinstance(size, int)]
    if len(unknown) > 1:
        return None
    for axis in unknown:
        wanted[axis] = -1
    shape = view.emit_constant(np.asarray(wanted, dtype=np.int64), at=value)
    return view.node_at("Reshape", [data, shape], {}, at=value)


def _heads_apart(view: OnnxView, value: str) -> str | None:
    """Attention on (B, N, H D), which has the number of heads as attributes, on (B, H, N, D)."""
    node = view.node(value)
    if operator_name(node) != "Attention" or view.is_final(value) or not plain_attention(view, value):
        return None
    if any(view.shape(t.name) is None or len(view.shape(t.name) or ()) != 3 for t in node.inputs[:3]):
        return None
    heads = [node.attrs["q_num_heads"], node.attrs["kv_num_heads"], node.attrs["kv_num_heads"]]
    apart = []
    for tensor, count in zip(node.inputs, heads, strict=False):
        four = view.emit("reshape", [tensor.name], {"shape": (0, 0, count, -1)}, at=value)
        apart.append(view.emit("transpose", [four], {"perm": (0, 2, 1, 3)}, at=value))
    attrs = {k: v for k, v in node.attrs.items() if k not in ("q_num_heads", "kv_num_heads")}
    mask = node.inputs[3].name or None if len(node.inputs) > 3 else None
    y = view.node_at("Attention", [*apart, mask], attrs, at=value)
    y = view.emit("transpose", [y], {"perm": (0, 2, 1, 3)}, at=value)
    return view.emit("reshape", [y], {"shape": (0, 0, -1)}, at=value)


CANONICAL: Any = Canonical()
