"""Whether the ``If`` nodes of an ONNX graph keep to what a target can compile, before its compiler is asked.

ONNX itself lets paired outputs differ in shape and rank. TensorRT wants equal ranks, a 0-d predicate and nothing in a
branch that it has no layer for there (found by building with TensorRT-RTX 1.7). A step cache's own node must besides
have equal shapes, for its state keeps them, and draw no random numbers, whose order would depend on the decisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from hasten.passes.branch_rule import DEEPEST, Violation, refuse
from hasten.passes.onnx import types
from hasten.passes.onnx.graph import OnnxGraph, Scope, operator_name
from hasten.passes.onnx.traced import RULE

ATTENTION = frozenset({"Attention", "com.microsoft.MultiHeadAttention", "hasten.Attention"})
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})


def require(model: onnx.ModelProto, target: str) -> None:
    """Raise `HastenError`, naming node and rule, where ``target`` cannot compile a conditional of ``model``."""
    if any(node.op_type == "If" for node in _nodes(model)):
        refuse(violations(OnnxGraph(model), target), target)


def violations(graph: OnnxGraph, target: str) -> list[Violation]:
    """Every violation of ``target``'s branch rules; the target's operators must be in place already."""
    tensorrt = target.partition(":")[0] in ("tensorrt", "tensorrt-rtx")
    found: list[Violation] = []
    for scope in graph.scopes:
        for node in scope.graph.nodes:
            if node.op == "If" and not node.domain:
                found += _conditional(node, _where(scope, node), tensorrt=tensorrt)
    for scope, ours, depth in _branches(graph):
        if depth == DEEPEST + 1:
            found.append(
                Violation(scope.path, "depth", f"{depth} conditionals stand in each other", f"nest at most {DEEPEST}")
            )
        for node in scope.graph.nodes:
            found += _inner(node, _where(scope, node), tensorrt=tensorrt, ours=ours)
    return found


def _conditional(node: Any, where: str, *, tensorrt: bool) -> Iterator[Violation]:
    """The rules about predicate and outputs."""
    predicate = node.inputs[0]
    if types.known(predicate):
        kind = f"{types.dtype_name(predicate)} of shape {tuple(predicate.shape)}"
        many = any(isinstance(d, int) and d != 1 for d in predicate.shape)
        if types.dtype_name(predicate) != "bool" or many:
            yield Violation(where, "predicate", f"its predicate is {kind}", "make it one bool")
        elif tensorrt and predicate.shape:
            yield Violation(where, "predicate", f"its predicate is {kind}", "squeeze it to 0 dimensions")
    then, otherwise = (node.attrs[name].outputs for name in ("then_branch", "else_branch"))
    if not len(then) == len(otherwise) == len(node.outputs):
        counts = f"{len(then)} and {len(otherwise)} values for {len(node.outputs)} outputs"
        yield Violation(where, "outputs", f"its branches return {counts}", "return one value for each output")
        return
    for output, a, b in zip(node.outputs, then, otherwise, strict=True):
        if problem := _pair(a, b, ranks=tensorrt or _is_ours(node), shapes=_is_ours(node)):
            rule, found, todo = problem
            yield Violation(where, rule, f"for {output.name} its branches return {found}", todo)


def _pair(a: Any, b: Any, *, ranks: bool, shapes: bool) -> tuple[str, str, str] | None:
    kinds = [types.dtype_name(t) for t in (a, b)]
    if None not in kinds and kinds[0] != kinds[1]:
        return "dtype", f"{kinds[0]} and {kinds[1]}", "cast one of them"
    if a.shape is None or b.shape is None:
        return None
    if ranks and len(a.shape) != len(b.shape):
        return "rank", f"{len(a.shape)} and {len(b.shape)} dimensions", "reshape one of them"
    sizes = zip(a.shape, b.shape, strict=False)
    if shapes and any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in sizes):
        return "shape", f"{tuple(a.shape)} and {tuple(b.shape)}", "both must return what the state keeps"
    return None


def _inner(node: Any, where: str, *, tensorrt: bool, ours: bool) -> Iterator[Violation]:
    """The rules about what stands in a branch."""
    op = operator_name(node)
    if tensorrt and op in ATTENTION:
        todo = "spell it out as MatMul, Softmax, MatMul (the pass legalise does)"
        yield Violation(where, "attention", f"{op} has no layer inside a conditional", todo)
    elif tensorrt and node.domain == "com.microsoft":
        yield Violation(where, "contrib", f"{op} is no standard operator", "let the pass legalise spell it out")
    if ours and op in RANDOM:
        todo = "leave it out of the region (region=FIRST:LAST)"
        yield Violation(where, "random", f"{op} in a branch draws numbers only where a step computes", todo)
    if (tensorrt or ours) and op in DATA_DEPENDENT:
        todo = "leave it out of the branch"
        yield Violation(where, "data-dependent shape", f"the size of {op}'s result depends on the data", todo)


def _branches(graph: OnnxGraph) -> Iterator[tuple[Scope, bool, int]]:
    """Scopes inside a conditional or a loop, and functions called there; whether a step cache put them there; depth."""
    owners: dict[int, Any] = {
        id(inner): node for s in graph.scopes for node in s.graph.nodes for inner in _graphs(node)
    }
    called = {(s.template.domain, s.template.name): s for s in graph.scopes if s.is_function}
    todo = [(s, [owners[id(c.graph)] for c in s.chain() if id(c.graph) in owners]) for s in graph.scopes]
    seen = set()
    while todo:
        scope, around = todo.pop(0)
        if not around or (id(scope), len(around)) in seen:
            continue
        seen.add((id(scope), len(around)))
        yield scope, any(_is_ours(node) for node in around), len(around)
        for node in scope.graph.nodes:
            function = called.get((node.domain or "", node.op))
            if function is not None:
                todo.append((function, around))


def _graphs(node: Any) -> Iterator[Any]:
    return (value for value in node.attrs.values() if isinstance(value, gs.Graph))


def _is_ours(node: Any) -> bool:
    return any(p.key == "hasten.rule" and p.value == RULE for p in node.template.metadata_props)


def _where(scope: Scope, node: Any) -> str:
    name = node.name or (node.outputs[0].name if node.outputs else node.op)
    return f"node {'/'.join(part for part in (scope.path, name) if part)} ({operator_name(node)})"


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node
