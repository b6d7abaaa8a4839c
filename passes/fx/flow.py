"""An FX graph as `passes.steps.flow.DataFlow`: Dynamo's graphs, and exported ones, decomposed or not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import is_from_unspecialized_param_buffer_source

from hasten.passes.fx import flops as counting
from hasten.passes.fx.call import mutates
from hasten.passes.fx.view import FxView, call_name, fake
from hasten.passes.steps.flow import Joined, Piece

_PARTS = ("split", "chunk", "split_with_sizes", "tensor_split")


class FxFlow:
    """The values are the nodes of one graph."""

    def __init__(self, view: FxView) -> None:
        self.view = view
        self.graph = view.graph

    def values(self) -> Sequence[fx.Node]:
        return [n for n in self.graph.nodes if n.op in ("call_function", "call_method", "call_module")]

    def inputs(self) -> Mapping[str, fx.Node]:
        given = (n for n in self.graph.find_nodes(op="placeholder") if not _is_parameter(n))
        return {str(n.target): n for n in given if isinstance(fake(n), torch.Tensor)}

    def outputs(self) -> Sequence[fx.Node]:
        return list(self.graph.find_nodes(op="output")[0].all_input_nodes)

    def operands(self, value: fx.Node, /) -> tuple[fx.Node, ...]:
        return tuple(value.all_input_nodes)

    def made_with(self, value: fx.Node, /) -> tuple[fx.Node, ...]:
        return (value,)

    def name(self, value: fx.Node, /) -> str:
        return call_name(value)

    def piece(self, value: fx.Node, /) -> Piece[fx.Node] | None:
        name = call_name(value)
        if name == "getitem" and isinstance(value.args[0], fx.Node):
            whole, index = value.args
            return _part(whole, index) if isinstance(index, int) else _indexed(value, whole, index)
        if name in ("slice", "narrow") and isinstance(value.target, torch._ops.OpOverload):
            whole, axis, start = (*value.args, 0, 0)[:3]
            return _cut(value, whole, axis, start) if name == "narrow" or value.args[4:] in ((), (1,)) else None
        return None

    def joined(self, value: fx.Node, /) -> Joined[fx.Node] | None:
        if call_name(value) not in ("cat", "concat", "concatenate"):
            return None
        parts = value.args[0] if value.args else value.kwargs.get("tensors")
        axis = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", value.kwargs.get("axis", 0))
        sizes = self.sizes(value)
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) for p in parts):
            return None
        return Joined(tuple(parts), axis % len(sizes)) if sizes and isinstance(axis, int) else None

    def sizes(self, value: fx.Node, /) -> tuple[int, ...] | None:
        return counting.shape(value) if isinstance(fake(value), torch.Tensor) else None

    def flops(self, value: fx.Node, /) -> int:
        if isinstance(value.target, torch._ops.OpOverload):
            return counting._flops(value)
        return _neutral_flops(self, value)

    def draws(self, value: fx.Node, /) -> bool:
        name = call_name(value).removeprefix("F.")
        return self.view.op(value) is None and (name in _RANDOM or _is_random(value))

    def owner(self, value: fx.Node, /) -> fx.Node:
        while value.args and isinstance(value.args[0], fx.Node) and shares_memory(value):
            value = value.args[0]
        return value

    def writes(self) -> Collection[fx.Node]:
        changing = (n for n in self.values() if mutates(n, call_name(n)) and call_name(n) not in ("and_", "or_"))
        return [n for n in changing if n.args and isinstance(n.args[0], fx.Node)]


_VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "t", "T",
     "mT", "transpose", "permute", "swapaxes", "select", "narrow", "getitem", "chunk", "split", "unbind", "to", "float",
     "half", "bfloat16", "type_as", "contiguous", "detach", "diagonal"}
)  # fmt: skip
"""Functions and methods of Dynamo's graphs whose result may be a view; operators of exported ones say so."""


def shares_memory(node: fx.Node) -> bool:
    """Whether a call returns a view of its first operand, or may."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(r.alias_info is not None for r in node.target._schema.returns)
    name = call_name(node).removeprefix("F.")
    return name in _VIEWS or mutates(node, name)


_RANDOM = frozenset(
    {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "bernoulli", "rrelu",
     "multinomial", "poisson", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
)  # fmt: skip
"""Functions of Dynamo's graphs; operators of exported ones are tagged."""


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _is_parameter(node: fx.Node) -> bool:
    """Dynamo passes a module's parameters and buffers as inputs."""
    source = getattr(node, "_dynamo_source", None)
    return source is not None and is_from_unspecialized_param_buffer_source(source)


def _cut(value: fx.Node, whole: Any, axis: Any, start: Any) -> Piece[fx.Node] | None:
    """A slice that starts at ``start``; how long it is, its shape says."""
    before, after = fake(whole), fake(value)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or not isinstance(axis, int):
        return None
    first = fake(start) if isinstance(start, fx.Node) else 0 if start is None else start
    first = first if isinstance(first, int) else getattr(getattr(first, "node", None), "hint", None)
    if not isinstance(first, int):
        return None
    old, new = counting.shape(before), counting.shape(after)
    axis %= len(old)
    others = [i for i in range(len(old)) if i != axis]
    if len(old) != len(new) or any(old[i] != new[i] for i in others):
        return None
    first = first + old[axis] if first < 0 else min(first, old[axis])
    return Piece(whole, axis, first, first + new[axis])


def _indexed(value: fx.Node, whole: fx.Node, index: Any) -> Piece[fx.Node] | None:
    """``x[:, 16:]``."""
    listed = list(index) if isinstance(index, tuple) else [index]
    sizes = fake(whole)
    if not isinstance(sizes, torch.Tensor) or not all(isinstance(i, slice) or i is Ellipsis for i in listed):
        return None
    if Ellipsis in listed:
        at = listed.index(Ellipsis)
        listed[at : at + 1] = [slice(None)] * (sizes.ndim - len(listed) + 1)
    narrow = [(axis, cut) for axis, cut in enumerate(listed) if cut != slice(None)]
    if len(narrow) != 1 or narrow[0][1].step not in (None, 1):
        return None
    return _cut(value, whole, narrow[0][0], narrow[0][1].start)


def _part(node: fx.Node, index: int) -> Piece[fx.Node] | None:
    """One result of a split."""
    if call_name(node).removeprefix("F.") not in _PARTS or not isinstance(fake(node), (tuple, list)):
        return None
    whole = node.args[0]
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    pieces = [counting.shape(t) for t in fake(node)]
    if not isinstance(whole, fx.Node) or not isinstance(axis, int):
        return None
    axis %= len(pieces[0])
    index %= len(pieces)
    start = sum(p[axis] for p in pieces[:index])
    return Piece(whole, axis, start, start + pieces[index][axis])


def _neutral_flops(flow: FxFlow, node: fx.Node) -> int:
    """Of Dynamo's functions and methods, whose arguments have no schema."""
    op, result = flow.view.op(node), flow.sizes(node)
    if op is None or result is None or op.name not in _MULTIPLICATIONS:
        return 0
    shapes = [flow.sizes(v) if isinstance(v, fx.Node) else None for v in op.inputs]
    wanted = _MULTIPLICATIONS[op.name]
    if any(s is None for s in shapes[:wanted]):
        return 0
    a, b, *rest = [s or () for s in (*shapes, ())]
    if op.name == "sdpa":
        return 2 * math.prod(a[:-1]) * b[-2] * (a[-1] + rest[0][-1])
    if op.name.startswith("conv"):
        return 2 * math.prod(result) * math.prod(b[1:])
    if op.name == "baddbmm":
        return 2 * math.prod(result) * b[-1]
    return 2 * math.prod(result) * a[-1]


_MULTIPLICATIONS = {"linear": 2, "matmul": 2, "baddbmm": 3, "sdpa": 3, "conv1d": 2, "conv2d": 2, "conv3d": 2}
"""Neutral operators that multiply, and how many of their operands' shapes are needed."""
