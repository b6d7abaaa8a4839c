"""A pure function of arrays as ONNX nodes: exported once by torch, and copied in under names that nothing else has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import onnx

RULE = "step-cache"


class Value(NamedTuple):
    """What is known of one tensor of a graph: its name, numpy's name of its type, its sizes, symbolic ones by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Made(NamedTuple):
    """A tensor of a function's result that is none of its operands: the number of its output, its type and sizes."""

    output: int
    dtype: str
    shape: tuple[int | str, ...]


class Traced(NamedTuple):
    """Nodes in order, the constants that they read, and the function's result with a `Value` for each tensor."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]
    result: Any


def trace(
    function: Callable[..., Any], *operands: Any, opset: int, fresh: Callable[[str], str], base: str, rule: str = RULE
) -> Traced:
    """Write ``function(*operands)`` as nodes that read the operands by name.

    ``operands`` and the result are pytrees of tuples, lists and dicts with a `Value` for each tensor; an operand that
    the function returns untouched comes back as the same one. ``fresh`` makes a name that nothing has from a base.
    Every node carries ``rule``. Raises `HastenError` where the function does not fit its operands.
    """
    from hasten.passes.fx.function_to_onnx import export

    model, read, result = export(function, *operands, opset=opset)
    graph = model.graph
    names = {given.name: value.name for given, value in zip(graph.input, read, strict=True)}
    for name in own_names(graph):
        if name not in names:
            names[name] = fresh(f"{base}/{name}")
    for node in graph.node:
        rename(node, names)
        node.name = node.output[0]  # ONNX Runtime wants nodes to have different names
        node.metadata_props.add(key="hasten.rule", value=rule)
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    outputs = [names[output.name] for output in graph.output]
    return Traced(list(graph.node), list(graph.initializer), _finished(result, outputs))


def own_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every value that a graph and the graphs inside it make or are given."""
    yield from (v.name for v in graph.input)
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        yield from (name for name in node.output if name)
        for inner in subgraphs(node):
            yield from own_names(inner)


def fresh(base: str, taken: set[str]) -> str:
    """A name like ``base`` that is not among ``taken``, where it goes."""
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    taken.add(name)
    return name


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Branches and bodies of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, and those that the graphs inside it read of the graphs around them."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        made = set(own_names(graph))
        yield from (name for inner in graph.node for name in reads(inner) if name not in made)
        yield from (v.name for v in graph.output if v.name not in made)


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Give values other names wherever a node and the graphs inside it mention them, in place."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for graph in subgraphs(node):
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = names.get(value.name, value.name)
        for inner in graph.node:
            rename(inner, names)


def _finished(result: Any, outputs: Sequence[str]) -> Any:
    if isinstance(result, Made):
        return Value(outputs[result.output], result.dtype, result.shape)
    if isinstance(result, Value):
        return result
    if isinstance(result, Mapping):
        return {key: _finished(item, outputs) for key, item in result.items()}
    if isinstance(result, (tuple, list)):
        return type(result)(_finished(item, outputs) for item in result)
    return result
