"""`LEGALISE`: what the target cannot run, or runs slower than it could, is written in the target's own words.

Which operator becomes what stands in `passes.onnx.lower_onnxruntime` and `passes.onnx.lower_tensorrt`. Without a target
the fused operators stay, each with its body. A node written here is stamped with the target, and a later run for the
same target does not look at it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hasten.passes.onnx import lower_onnxruntime, lower_tensorrt
from hasten.passes.onnx.graph import OnnxGraph, operator_name
from hasten.passes.onnx.lowering import Left, Lowering
from hasten.passes.rule import MissSite, RuleReport, Site

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView
    from hasten.passes.pipeline import Context

LOWERINGS: Mapping[str, Mapping[str, Lowering]] = {
    "onnxruntime:cpu": lower_onnxruntime.CPU,
    "onnxruntime:cuda": lower_onnxruntime.CUDA,
    "tensorrt": lower_tensorrt.TENSORRT,
    "tensorrt-rtx": lower_tensorrt.TENSORRT,
}
"""Target, or its backend, -> operator -> how it is written there."""


class Legalise:
    """The pass. One site a node that was written anew; one miss a node that stays, with the reason."""

    name = "legalise"

    def run(self, graph: OnnxGraph, context: Context) -> RuleReport:
        graph.target = context.target
        lowerings = _lowerings(context.target)
        report = RuleReport(self.name)
        # Contrib operators first: some become fused operators, which are lowered in the second round.
        for contrib in (True, False):
            chosen = {op: lower for op, lower in lowerings.items() if op.startswith("com.microsoft.") is contrib}
            for view in graph.views():
                report += _sweep(view, chosen, context)
        for view in graph.views():
            report += _refused(view, lowerings, context)
        return report


def _sweep(view: OnnxView, lowerings: Mapping[str, Lowering], context: Context) -> RuleReport:
    sites: list[Site] = []
    misses: list[MissSite] = []
    view.rule = LEGALISE.name
    for value in list(view.values()):
        node = view.node(value)
        if node is None or node.outputs[0].name != value or view.is_final(value):
            continue
        op = operator_name(node)
        if op not in lowerings or context.fuel.spent:
            continue
        where, result = view.where(value), lowerings[op](view, value, context)
        if result is None:
            continue
        if isinstance(result, Left):
            misses.append(MissSite(where, f"{op}: {result.reason}"))
            continue
        context.fuel.burn()
        sites.append(Site(where, op.rpartition(".")[2], view.describe(result.new)))
        view.substitute(result.old, result.new)
    return RuleReport(LEGALISE.name, tuple(sites), tuple(misses))


def _refused(view: OnnxView, lowerings: Mapping[str, Lowering], context: Context) -> RuleReport:
    """The support table's word on operators that nothing here rewrites."""
    misses = []
    for value in view.values():
        node = view.node(value)
        dtype, op = view.dtype(value), operator_name(node)
        if not context.target or dtype not in ("float32", "float16", "bfloat16") or op not in ASKED or op in lowerings:
            continue
        why = context.supports(op, dtype, in_control_flow=view.scope.in_control_flow)
        if why is not None and node.outputs[0].name == value:
            misses.append(MissSite(view.where(value), f"{op}: {why}"))
    return RuleReport(LEGALISE.name, misses=tuple(misses))


def _lowerings(target: str) -> Mapping[str, Lowering]:
    return LOWERINGS.get(target) or LOWERINGS.get(target.partition(":")[0]) or {}


ASKED = frozenset(
    {
        "Attention",
        "com.microsoft.MultiHeadAttention",
        "com.microsoft.FusedConv",
        "com.microsoft.FusedMatMul",
        "com.microsoft.SkipLayerNormalization",
        "com.microsoft.BiasAdd",
        "com.microsoft.BiasSplitGelu",
        "com.microsoft.GroupNorm",
        "com.microsoft.NhwcConv",
        "com.microsoft.PackedMultiHeadAttention",
        "com.microsoft.SkipGroupNorm",
    }
)
"""Operators of the support table that may be refused and that not every target has a lowering for."""

LEGALISE: Any = Legalise()
