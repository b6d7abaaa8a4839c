"""Which values of an FX graph share memory with something that a call changes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hasten.passes.fx.call import mutates


def written(graph: fx.Graph, name_of: Any) -> set[fx.Node]:
    """Every node whose memory some call changes, and the nodes that it may be a view of.

    A call may return a view of its first operand unless it is a random or constant factory, which has none; taking
    too many for views only makes fewer values known.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if mutates(node, name_of(node)):
            for operand in _changed(node):
                _mark(operand, found)
            found.add(node)
    return found


def _changed(node: fx.Node) -> list[Any]:
    """The operands that a mutating call writes to."""
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        by_name = {a.name: a for a in arguments}
        given = [*zip(node.args, arguments, strict=False), *((v, by_name[k]) for k, v in node.kwargs.items())]
        return [v for v, a in given if a.alias_info is not None and a.alias_info.is_write]
    out = node.kwargs.get("out")
    return [*node.args[:1], *(out if isinstance(out, (tuple, list)) else [out])]


def _mark(value: Any, found: set[fx.Node]) -> None:
    while isinstance(value, fx.Node) and value not in found:
        found.add(value)
        value = value.args[0] if value.args else None
        if isinstance(value, (tuple, list)):  # torch.cat, torch.stack: a new tensor
            return
