"""Whether the ``torch.cond`` nodes of a graph keep to what a target can compile, before its compiler is asked.

Most are torch's own rules, which it tells in words of its tracer or not at all: what a branch returns must have one
type, shape and layout, and memory of its own; nothing in a branch may write to what it is given, or draw random
numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from hasten.passes.branch_rule import DEEPEST, Violation, refuse
from hasten.passes.fx.call import mutates
from hasten.passes.fx.view import FxView, call_name, fake


def require(module: fx.GraphModule, target: str) -> None:
    """Raise `HastenError`, naming node and rule, where ``target`` cannot compile a conditional of ``module``."""
    refuse(violations(module, target), target)


def violations(module: fx.GraphModule, target: str, depth: int = 0, path: str = "") -> list[Violation]:
    """Every violation of ``target``'s branch rules by the conditionals of ``module``, and by those inside them.

    ``depth`` is how many conditionals ``module`` itself stands in, ``path`` their names.
    """
    backend = target.partition(":")[0]
    found = []
    for node in module.graph.nodes:
        if node.target is not torch.ops.higher_order.cond:
            continue
        where = f"{path}{node.name}"
        branches = [getattr(module, branch.target) for branch in node.args[1:3]]
        if backend == "torch-tensorrt":
            todo = "build tensorrt or tensorrt-rtx, or take the form 'straight'"
            found.append(Violation(where, "backend", "torch_tensorrt has no converter for torch.cond", todo))
        if depth == DEEPEST:
            nested = f"{depth + 1} conditionals stand in each other"
            found.append(Violation(where, "depth", nested, f"nest at most {DEEPEST}"))
        found += _predicate(node, where, backend)
        found += _outputs(branches, where)
        for branch, label in zip(branches, ("true", "false"), strict=True):
            inside = f"{where}.{label}/"
            view = FxView(branch)
            found += [v for inner in branch.graph.nodes for v in _inner(inner, inside, view)]
            found += _aliases(branch, inside)
            found += violations(branch, target, depth + 1, inside)
    return found


def _predicate(node: fx.Node, where: str, backend: str) -> Iterator[Violation]:
    value = fake(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return
    kind = f"{_type(value)} of shape {tuple(value.shape)}"
    if value.dtype is not torch.bool or value.numel() != 1:
        yield Violation(where, "predicate", f"its predicate is {kind}", "make it one bool")
    elif backend in ("tensorrt", "tensorrt-rtx") and value.ndim:
        yield Violation(where, "predicate", f"its predicate is {kind}", "squeeze it to 0 dimensions")


def _outputs(branches: list[fx.GraphModule], where: str) -> Iterator[Violation]:
    returned = [_returned(branch) for branch in branches]
    if len(returned[0]) != len(returned[1]):
        counts = " and ".join(str(len(r)) for r in returned)
        yield Violation(where, "outputs", f"its branches return {counts} values", "return as many in both")
        return
    for i, pair in enumerate(zip(*returned, strict=True)):
        a, b = (fake(node) if isinstance(node, fx.Node) else node for node in pair)
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        what = f"for output {i} its branches return"
        if a.dtype != b.dtype:
            yield Violation(where, "dtype", f"{what} {_type(a)} and {_type(b)}", "convert one of them")
        elif a.ndim != b.ndim:
            yield Violation(where, "rank", f"{what} {a.ndim} and {b.ndim} dimensions", "reshape one of them")
        elif tuple(a.shape) != tuple(b.shape):
            yield Violation(where, "shape", f"{what} {tuple(a.shape)} and {tuple(b.shape)}", "return one shape")
        elif a.stride() != b.stride():
            todo = "clone both with torch.contiguous_format"
            yield Violation(where, "strides", f"{what} the strides {a.stride()} and {b.stride()}", todo)


def _inner(node: fx.Node, path: str, view: FxView) -> Iterator[Violation]:
    where = f"{path}{node.name}"
    if mutates(node, call_name(node)) and memory_root(node).op in ("placeholder", "get_attr"):
        found = f"{node.target} writes in place to memory from outside"
        yield Violation(where, "in-place", found, "use the form that returns a new tensor")
    tags = getattr(node.target, "tags", ())
    # What the view knows draws nothing: dropout in evaluation is the identity.
    if torch.Tag.nondeterministic_seeded in tags and view.op(node) is None:
        todo = "draw them before the conditional and pass them in"
        yield Violation(where, "random", f"{node.target} draws random numbers", todo)
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        todo = "leave it out of the branch"
        yield Violation(where, "data-dependent shape", f"the result of {node.target} depends on the data", todo)


def _aliases(branch: fx.GraphModule, path: str) -> Iterator[Violation]:
    """Results that are an operand, a view of one, or in memory of another result."""
    owners: dict[fx.Node, int] = {}
    for i, node in enumerate(_returned(branch)):
        if not isinstance(node, fx.Node):
            continue
        root = memory_root(node)
        if root.op in ("placeholder", "get_attr"):
            found = f"output {i} may be in the memory of {root.name}"
            yield Violation(f"{path}{node.name}", "alias", found, "clone it")
        elif root in owners:
            shared = f"outputs {owners[root]} and {i} may share their memory"
            yield Violation(f"{path}{node.name}", "alias", shared, "clone one of them")
        owners.setdefault(root, i)


def memory_root(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views shows."""
    while node.op == "call_function" and node.args:
        source = node.args[0]
        schema = getattr(node.target, "_schema", None)
        view = schema is not None and any(r.alias_info is not None for r in schema.returns)
        item = node.target is operator.getitem and _is_view(source)
        if not (view or item) or not isinstance(source, fx.Node):
            return node
        node = source
    return node


def _is_view(node: Any) -> bool:
    """Whether a node makes a list of views, as ``aten.chunk`` does."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _returned(branch: fx.GraphModule) -> list[Any]:
    (output,) = branch.graph.find_nodes(op="output")
    returned = output.args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _type(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
