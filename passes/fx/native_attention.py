"""``native-attention``: attention without a mask gets the C++ kernel on a CPU, where that measured faster than torch's.

Float32, against `torch.nn.functional.scaled_dot_product_attention`, two threads of a Zen 4 (AVX-512); B, H, N, M, D and
how many times as fast, 20th to 80th percentile of rounds:

- 2, 8, 4096, 4096, 40: 1.54 (1.51 to 1.57); 2, 8, 1024, 1024, 80: 1.29 (1.25 to 1.35)
- 2, 8, 256, 256, 160: 1.32 (1.28 to 1.35); 2, 16, 256, 256, 72: 1.44 (1.38 to 1.52)
- 2, 8, 4096, 77, 40: 2.05 (1.97 to 2.23); 2, 8, 256, 256, 8: 4.29 (4.16 to 4.38)
- 2, 4, 1024, 1024, 256: 1.11 (1.08 to 1.20); 1, 1, 4096, 4096, 512: 1.11 (1.07 to 1.15)

Short calls gain too (1, 8, 16, 16, 64: 2.60), unless their queries leave lanes empty: vectors run along queries, and a
few of them in the last vector cost as much as all. 2, 8, N, 256, 64: 1.47 with 14 queries, 1.07 with 20, 1.37 with 27;
1, 1, 1, 64, 64: 0.77.

Torch's kernel stays for masks, for other types, where lanes stay empty, and for processors without AVX2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.view import fake
from hasten.passes.ops.attention.flash import WIDEST
from hasten.passes.ops.native import build
from hasten.passes.pattern import GraphView, Match, Op, Var
from hasten.passes.pipeline import Context
from hasten.passes.rule import Rule, RuleReport, apply

NAME = "native-attention"
TARGETS = ("inductor:cpu", "aoti:cpu")
LANES = 16
FILLED = 0.65
"""Least share of the lanes that hold a query."""
MEASURED = ("AVX2", "AVX512")

_ATTENTION = Op("attention", (Var("q"), Var("k"), Var("v"), Var("mask", optional=True)), binds=("scale", "causal"))


def filled(queries: int) -> float:
    """The share of the vectors' lanes that ``queries`` queries fill.

    >>> filled(4096), filled(24)
    (1.0, 0.75)
    """
    return queries / (-(-queries // LANES) * LANES) if queries else 0.0


def _guard(strict_nan: bool, view: GraphView[Any], found: Match[Any]) -> str | None:
    operands = {name: fake(found[name]) for name in ("q", "k", "v")}
    if found.values.get("mask") is not None or found.attrs["causal"]:
        return "the kernel has no masks"
    for name, operand in operands.items():
        if operand.device.type != "cpu" or operand.dtype != torch.float32:
            kind = str(operand.dtype).removeprefix("torch.")
            return f"{name} is {kind} on {operand.device.type}; the kernel is for float32 on a CPU"
    widths = [operands[name].shape[3] for name in ("q", "v")]
    if not all(isinstance(width, int) for width in widths):
        return "a head's width is not known before the call"
    if max(widths) > WIDEST:
        return f"heads are {max(widths)} wide; the kernel was measured up to {WIDEST}"
    queries = _example(operands["q"].shape[2])
    if queries is None:
        return "the number of queries is not known before the call"
    if filled(queries) < FILLED:
        return f"{queries} queries fill {filled(queries):.0%} of the kernel's vectors; torch's is faster"
    if strict_nan:
        return "an infinite value meets weights that underflow, and strict-nan was asked for"
    if (capability := torch.backends.cpu.get_cpu_capability()) not in MEASURED:
        return f"the kernel was measured with {' and '.join(MEASURED)} only, and this processor has {capability}"
    return build.load()


def _example(size: Any) -> int | None:
    """A size as a number; the example's where it may change from call to call."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return None if hint is None else int(hint)


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    operands = [found[name] for name in ("q", "k", "v")]
    return view.emit("flash_attention", operands, {"scale": found.attrs["scale"]}, at=root)


class NativeAttention:
    """The pass; it has no options."""

    name = NAME

    def run(self, graph: FxGraph, context: Context) -> RuleReport:
        report = RuleReport(NAME)
        if graph.ir != "fx" or context.target not in TARGETS:
            return report
        rule = Rule(
            name=NAME,
            spellings=(("attention", _ATTENTION),),
            guard=partial(_guard, context.limits.strict_nan),
            replace=_replace,
            anchors=frozenset({"attention"}),
        )
        for view in graph.views():
            report += apply(rule, view, fuel=context.fuel, verify=context.verify)
        return report


NATIVE_ATTENTION = NativeAttention()
