"""``native-group-norm``: GroupNorms that stay on their own get the C++ kernels, where those measured faster.

Two passes over memory whatever the layout; Inductor's own code reads a channels-last map once a group. Measured against
what Inductor makes of ``group_norm_act``, two threads, channels-last, with SiLU: 320 channels at 64x64 1.5 times as
fast, 512 at 64x64 1.5, 128 at 256x256 1.6 (3 with memory kept from call to call). Small maps stay where Inductor can
fuse them with their neighbours.
"""

from __future__ import annotations

from typing import Any

from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.view import fake
from hasten.passes.ops.native import build
from hasten.passes.pattern import GraphView, Match
from hasten.passes.pipeline import Context
from hasten.passes.rule import Rule, RuleReport, apply
from hasten.passes.rules import norm_operands

NAME = "native-group-norm"
SMALLEST = 1 << 16
"""Elements of a map below which a call of its own costs more than it saves."""


def _guard(view: GraphView[Any], found: Match[Any]) -> str | None:
    x = fake(found["x"])
    if x.device.type != "cpu" or str(x.dtype) != "torch.float32":
        return f"the map is {view.dtype(found['x'])} on {x.device.type}; the kernel is for float32 on a CPU"
    if (why := norm_operands.unfit(view, found)) is not None:
        return why
    if found.attrs["norm_act"] not in ("none", "silu"):
        return f"the kernel has no {found.attrs['norm_act']}"
    if not all(isinstance(n, int) for n in x.shape):
        return "the map's size is not known before the call"
    if x.numel() < SMALLEST:
        return f"a map of {x.numel()} elements is small enough to be fused with its neighbours"
    return None


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    operands = [found["x"], *norm_operands.values(found)]
    attrs = {"groups": found.attrs["norm_groups"], "eps": found.attrs["norm_eps"]}
    affine = view.emit("group_norm_affine", operands, attrs, at=root)
    return view.emit("apply_affine", [found["x"], affine], {"act": found.attrs["norm_act"]}, at=root)


_RULE = Rule(
    name=NAME,
    spellings=(("norm", norm_operands.pattern()),),
    guard=_guard,
    replace=_replace,
    anchors=frozenset({"group_norm_act"}),
    variant=lambda found: found.attrs["norm_act"],
)


class NativeGroupNorm:
    """The pass; it has no options."""

    name = NAME

    def run(self, graph: FxGraph, context: Context) -> RuleReport:
        report = RuleReport(NAME)
        if graph.ir != "fx" or context.target not in ("inductor:cpu", "aoti:cpu") or not build.available():
            return report
        for view in graph.views():
            report += apply(_RULE, view, fuel=context.fuel, verify=context.verify)
        return report


NATIVE_GROUP_NORM = NativeGroupNorm()
