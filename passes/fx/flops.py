"""Floating-point operations and memory traffic of an FX graph, from the shapes that tracing left in its nodes.

A multiplication with an addition is two operations, as `torch.utils.flop_counter` counts; convolutions, products of
matrices and attention are counted, nothing else. Traffic is what every operator reads and writes if nothing is fused:
each operand and each result once, views free. Symbolic sizes count with the size of the example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hasten.passes.cost import Cost, add
from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.view import call_name, fake

Arguments = Mapping[str, Any]


def costs(graph: FxGraph) -> dict[str, Cost]:
    """What the nodes of each operator cost together; every nested graph (a branch, a loop's body) counts once."""
    found: dict[str, Cost] = {}
    for module in graph.modules():
        for node in module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                add(found, call_name(node), Cost(1, _flops(node), _bytes(node)))
    return found


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _flops(node: fx.Node) -> int:
    rule = _MULTIPLICATIONS.get(call_name(node))
    result = fake(node)
    if rule is None or not isinstance(result, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    names = [a.name for a in node.target._schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return 2 * rule(arguments, shape(result))


def _bytes(node: fx.Node) -> int:
    name = call_name(node)
    if name == "getitem" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    results = _tensors(fake(node))
    operands = [t for n in node.all_input_nodes for t in _tensors(fake(n))]
    if name in ("embedding", "index_select", "gather"):  # reads the rows that it returns, not the table
        return 2 * sum(map(_size, results)) + sum(_size(t) for t in operands if not t.dtype.is_floating_point)
    if _is_view(node, operands, results) or (name == "dropout" and node.args[2:] == (False,)):
        return 0
    return sum(map(_size, operands)) + sum(map(_size, results))


def _is_view(node: fx.Node, operands: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    returns = node.target._schema.returns
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliases and bool(operands) and all(r.dtype == operands[0].dtype for r in results)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _size(tensor: torch.Tensor) -> int:
    return math.prod(shape(tensor)) * tensor.element_size()


def shape(value: Any) -> tuple[int, ...]:
    """Sizes as numbers; a symbolic one is that of the example."""
    tensor = fake(value) if isinstance(value, fx.Node) else value
    return tuple(d if isinstance(d, int) else int(d.node.hint or 1) for d in tensor.shape)


def _convolution(given: Arguments, result: tuple[int, ...]) -> int:
    """A transposed one spreads every element of its input, another one gathers every element of its result."""
    weight = shape(given["weight"])
    each = math.prod(weight) // weight[0]
    return math.prod(shape(given["input"]) if given.get("transposed") else result) * each


def _transposed(given: Arguments, result: tuple[int, ...]) -> int:
    return _convolution({**given, "transposed": True}, result)


def _product(left: str) -> Callable[[Arguments, tuple[int, ...]], int]:
    return lambda given, result: math.prod(result) * shape(given[left])[-1]


def _einsum(given: Arguments, result: tuple[int, ...]) -> int:
    operands, _, _ = given["equation"].replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(operands.split(","), given["tensors"], strict=True):
        if "." in letters:
            return 0
        sizes.update(zip(letters, shape(operand), strict=True))
    return math.prod(sizes.values()) if len(given["tensors"]) > 1 else 0


def _attention(query: str, key: str, value: str) -> Callable[[Arguments, tuple[int, ...]], int]:
    def count(given: Arguments, result: tuple[int, ...]) -> int:
        *batch, queries, width = shape(given[query])
        return math.prod(batch) * queries * shape(given[key])[-2] * (width + shape(given[value])[-1])

    return count


def _upsample_conv(given: Arguments, result: tuple[int, ...]) -> int:
    return math.prod(result) * math.prod(shape(given["weight"])[1:])


def _winograd(given: Arguments, result: tuple[int, ...]) -> int:
    """Those of the direct convolution, as for every rewrite: what is computed, not how."""
    return math.prod(result) * 9 * shape(given["x"])[1]


_MULTIPLICATIONS: dict[str, Callable[[Arguments, tuple[int, ...]], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    **dict.fromkeys(("mm", "bmm", "mv", "matmul", "dot"), _product("self")),
    "linear": _product("input"),
    "addmm": _product("mat1"),
    "baddbmm": _product("batch1"),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention("query", "key", "value"),
    **dict.fromkeys(("hasten.attention", "hasten.flash_attention"), _attention("q", "k", "v")),
    "hasten.upsample_conv2d": _upsample_conv,
    "hasten.winograd_conv2d": _winograd,
}
"""Multiplications by operator, from its arguments by name and the shape of its result."""
