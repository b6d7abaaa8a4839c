"""Operations and memory traffic of an ONNX graph, from inferred shapes; counted as `passes.fx.flops` does.

A node whose shapes are not known costs nothing, and `costs` says how many those are. Symbolic sizes count as 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from hasten.passes.cost import Cost, add
from hasten.passes.onnx.graph import OnnxGraph, Scope, operator_name
from hasten.passes.onnx.types import onnx_dtype

Shape = tuple[int, ...]


class Counted(NamedTuple):
    """Costs by operator; ``symbols``: sizes that were taken as 1; ``unknown``: nodes that could not be counted."""

    costs: dict[str, Cost]
    symbols: tuple[str, ...]
    unknown: int


def costs(graph: OnnxGraph) -> Counted:
    """What the nodes of each operator cost together.

    Every branch and loop body counts once, and a local function's body once for each node that calls it.
    """
    found: dict[str, Cost] = {}
    symbols: dict[str, None] = {}
    unknown = 0
    calls = _calls(graph)
    for scope in graph.scopes:
        times = calls[_home(scope)]
        for node in scope.graph.nodes:
            if (node.domain or "", node.op) in calls:
                continue
            for tensor in (*node.inputs, *node.outputs):
                symbols.update(dict.fromkeys(d for d in tensor.shape or () if isinstance(d, str)))
            flops, traffic = _flops(node), _bytes(node)
            unknown += times * (flops is None or traffic is None)
            add(found, operator_name(node), Cost(times, times * (flops or 0), times * (traffic or 0)))
    return Counted(found, tuple(symbols), unknown)


def _home(scope: Scope) -> tuple[str, str]:
    """The local function that a scope belongs to; ``("", "")`` for the main graph."""
    outer = scope.chain()[-1]
    return (outer.template.domain, outer.template.name) if outer.is_function else ("", "")


def _calls(graph: OnnxGraph) -> Counter[tuple[str, str]]:
    """How often the main graph (once) and every local function run; functions cannot be recursive."""
    nodes: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for scope in graph.scopes:
        own = nodes.setdefault(_home(scope), Counter())
        own.update((n.domain or "", n.op) for n in scope.graph.nodes)
    calls: Counter[tuple[str, str]] = Counter()

    def enter(home: tuple[str, str], times: int) -> None:
        calls[home] += times
        for name, count in nodes[home].items():
            if name in nodes and name != ("", ""):
                enter(name, times * count)

    enter(("", ""), 1)
    for home in nodes:
        calls[home] += 0
    return calls


def weight_bytes(graph: OnnxGraph) -> int:
    """Bytes of all constants; one that several nodes read counts once."""
    held = {
        id(t): t
        for scope in graph.scopes
        for node in scope.graph.nodes
        for t in node.inputs
        if isinstance(t, gs.Constant)
    }
    return sum(_size(t) or 0 for t in held.values())


def _shape(tensor: Any) -> Shape | None:
    if tensor.shape is None or any(d is None for d in tensor.shape):
        return None
    return tuple(int(d) if isinstance(d, (int, np.integer)) else 1 for d in tensor.shape)


def _size(tensor: Any) -> int | None:
    shape, data_type = _shape(tensor), onnx_dtype(tensor)
    if shape is None or not data_type:
        return None
    return math.prod(shape) * _BYTES.get(data_type, 4)


_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}
"""Bytes of an element by `onnx.TensorProto.DataType`."""
_FREE = frozenset(
    {"Constant", "ConstantOfShape", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"}
)
_CONTROL = frozenset({"If", "Loop", "Scan"})


def _bytes(node: Any) -> int | None:
    if node.op in _FREE or node.op in _CONTROL:
        return 0
    results = [_size(t) for t in node.outputs if t.name]
    operands = [_size(t) for t in node.inputs if t.name]
    if node.op in ("Gather", "GatherElements", "GatherND"):  # reads the rows that it returns, not the table
        operands = [*results, *operands[1:]]
    if any(s is None for s in (*operands, *results)):
        return None
    return sum(s for s in (*operands, *results) if s is not None)


def _flops(node: Any) -> int | None:
    rule = _MULTIPLICATIONS.get(operator_name(node))
    if rule is None:
        return 0
    operands = [_shape(t) if t.name else None for t in node.inputs]
    result = _shape(node.outputs[0])
    wanted = operands[:3] if "Attention" in node.op else operands[:2]
    if result is None or any(s is None for s in wanted):
        return None
    return 2 * rule(node, [s or () for s in operands], result)


def _conv(node: Any, operands: list[Shape], result: Shape) -> int:
    return math.prod(result) * math.prod(operands[1][1:])


def _conv_transpose(node: Any, operands: list[Shape], result: Shape) -> int:
    return math.prod(operands[0]) * math.prod(operands[1][1:])


def _gemm(node: Any, operands: list[Shape], result: Shape) -> int:
    return math.prod(result) * operands[0][0 if node.attrs.get("transA") else 1]


def _matmul(node: Any, operands: list[Shape], result: Shape) -> int:
    return math.prod(result) * operands[0][-1]


def _einsum(node: Any, operands: list[Shape], result: Shape) -> int:
    terms = node.attrs["equation"].replace(" ", "").partition("->")[0].split(",")
    if len(terms) < 2 or any("." in t for t in terms):
        return 0
    sizes = {
        letter: size
        for term, shape in zip(terms, operands, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    return math.prod(sizes.values())


def _attention(node: Any, operands: list[Shape], result: Shape) -> int:
    q, k, v = operands[:3]
    if len(q) == 4:  # (B, H, N, D), (B, Hk, M, D), (B, Hk, M, Dv)
        return math.prod(q[:3]) * k[2] * (q[3] + v[3])
    # (B, N, H D), (B, M, Hk D), (B, M, Hk Dv); MultiHeadAttention also takes k and v as (B, H, M, D)
    heads = node.attrs.get("q_num_heads", 1) / node.attrs.get("kv_num_heads", node.attrs.get("q_num_heads", 1))
    keys, width = (k[2], v[1] * v[3]) if len(k) == 4 else (k[1], v[2])
    return int(q[0] * q[1] * keys * (q[2] + width * heads))


def _upsample_conv(node: Any, operands: list[Shape], result: Shape) -> int:
    return math.prod(result) * math.prod(operands[1][1:])


_MULTIPLICATIONS: dict[str, Callable[[Any, list[Shape], Shape], int]] = {
    "Conv": _conv,
    "com.microsoft.FusedConv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "com.microsoft.FusedMatMul": _matmul,
    "Einsum": _einsum,
    "Attention": _attention,
    "hasten.Attention": _attention,
    "com.microsoft.MultiHeadAttention": _attention,
    "hasten.UpsampleConv2d": _upsample_conv,
}
"""Multiplications by operator, from the node, the shapes of its operands and that of its result."""
