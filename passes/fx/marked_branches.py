"""The branches of ``torch.cond`` in line, between marks of which `passes.onnx.marked_branches` makes an ``If``.

torch's exporter traces what is in a branch many times over, once for each thing that it wants to know of a conditional;
what stands in line it traces once. A mark is an operator without a meaning of its own: `ENTER` passes what one branch
reads, `LEAVE` is given the predicate and the results of both and stands for those of the branch that is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hasten.passes.fx.view import fake
from hasten.passes.onnx.marked_branches import ENTER, LEAVE


def in_line(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``module`` with marks in the place of its conditionals, and of those inside them.

    A conditional stays as it is where its predicate is no tensor, or where its branches do not both return a tuple of
    tensors of the same types and sizes.
    """
    return _Writer().write(module)


class _Writer:
    """One graph, and what its nodes read from modules, by name."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.held: dict[str, Any] = {}
        self.marks = 0

    def write(self, module: fx.GraphModule) -> fx.GraphModule:
        self.graph.output(self._copy(module, {}, ""))
        return fx.GraphModule(self.held, self.graph)

    def _copy(self, module: fx.GraphModule, values: dict[fx.Node, Any], prefix: str) -> Any:
        """Append the nodes of ``module`` and return its results; what it reads is held under names with ``prefix``."""
        marked = {n: found for n in module.graph.nodes if (found := _branches(module, n)) is not None}
        apart = {branch for n in marked for branch in n.args[1:3] if branch.users.keys() <= marked.keys()}
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            if node in marked:
                values[node] = self._marked(node, marked[node], values)
            elif node not in values and node not in apart:
                values[node] = self.graph.node_copy(node, values.__getitem__)
                if node.op in ("get_attr", "call_module"):
                    values[node].target = prefix + node.target
                    self.held[prefix + node.target] = operator.attrgetter(node.target)(module)
        raise AssertionError("a graph ends in its output")

    def _marked(self, node: fx.Node, branches: Sequence[fx.GraphModule], values: dict[fx.Node, Any]) -> fx.Node:
        """Write both branches of a conditional; returns a node whose items are its results."""
        self.marks += 1
        number, ends = self.marks, []
        operands = [values[operand] if isinstance(operand, fx.Node) else operand for operand in node.args[3]]
        made = [_is_made(*which) for which in zip(node.args[3], operands, strict=True)]
        for side, branch in enumerate(branches):
            given = branch.graph.find_nodes(op="placeholder")
            marked = [i for i, inner in enumerate(given) if inner.users and made[i]]
            inside = dict(zip(given, operands, strict=True))
            if marked:
                entered = self.graph.call_function(_enter, (number, side, [operands[i] for i in marked]))
                inside |= {
                    given[i]: self.graph.call_function(operator.getitem, (entered, n)) for n, i in enumerate(marked)
                }
            ends.append(list(self._copy(branch, inside, f"branch_{number}_{side}_")))
        return self.graph.call_function(_leave, (number, node.name, values[node.args[0]], *ends))


def _branches(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule] | None:
    """The branches of a conditional that can be marked; None for every other node."""
    if node.target is not torch.ops.higher_order.cond or len(node.args) < 4 or not isinstance(node.args[0], fx.Node):
        return None
    found = [getattr(module, branch.target) for branch in node.args[1:3]]
    kinds = [[_kind(end) for end in _ends(branch)] for branch in found]
    alike = kinds[0] == kinds[1] and None not in kinds[0]
    return found if alike and kinds[0] and isinstance(fake(node.args[0]), Tensor) else None


def _ends(branch: fx.GraphModule) -> Sequence[Any]:
    results = branch.graph.find_nodes(op="output")[0].args[0]
    return results if isinstance(results, (tuple, list)) else ()


def _kind(end: Any) -> tuple[Any, str] | None:
    value = fake(end) if isinstance(end, fx.Node) else None
    return (value.dtype, str(tuple(value.shape))) if isinstance(value, Tensor) else None


def _is_made(operand: Any, copy: Any) -> bool:
    """Whether a node computes an operand, or it is an input; weights are read where they are, and sizes are numbers."""
    return isinstance(operand, fx.Node) and copy.op != "get_attr" and isinstance(fake(operand), Tensor)


def _enter(number: int, side: int, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    return _symbolic(ENTER, operands, {"number": number, "side": side}, operands)


def _leave(number: int, name: str, predicate: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> Any:
    return _symbolic(LEAVE, (predicate, *first, *second), {"number": number, "called": name}, first)


def _symbolic(op: str, inputs: Sequence[Tensor], attrs: dict[str, Any], like: Sequence[Tensor]) -> Sequence[Tensor]:
    dtypes, shapes = [t.dtype for t in like], [t.shape for t in like]
    made: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        f"hasten::{op}", inputs, attrs, dtypes=dtypes, shapes=shapes, version=1
    )
    return made
