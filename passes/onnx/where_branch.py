"""A choice between two large tensors as a branch: ``Where`` of one condition becomes ``If``.

ONNX Runtime's CPU kernel of Where writes two more tensors on its way: of 16x64x160 float32, 1 thread, it takes 0.050
ms, and a branch that copies the one 0.019 (ONNX Runtime 1.32, median of 200 runs).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hasten.passes.onnx.traced import fresh, own_names, subgraphs

SMALLEST = 1 << 14
"""Elements from which a branch is worth its own cost, some microseconds."""
Sizes = tuple[int | str, ...]


def run(model: onnx.ModelProto) -> int:
    """Rewrite ``model`` in place, branches and bodies too; returns how many there were."""
    return _graph(model.graph, {}, set(own_names(model.graph)))


def _graph(graph: onnx.GraphProto, around: Mapping[str, Sizes], names: set[str]) -> int:
    shapes = {**around, **{t.name: tuple(t.dims) for t in graph.initializer}}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
    done = 0
    for node in graph.node:
        done += sum(_graph(inner, shapes, names) for inner in subgraphs(node))
        if node.op_type != "Where" or node.domain not in ("", "ai.onnx"):
            continue
        condition, *chosen = node.input
        sizes = shapes.get(node.output[0], ())
        fixed = [size for size in sizes if isinstance(size, int) and size]
        if shapes.get(condition) != () or len(fixed) < len(sizes) or prod(fixed) < SMALLEST:
            continue
        kind = next((v for v in (*graph.output, *graph.value_info) if v.name == node.output[0]), None)
        if kind is None or not kind.type.tensor_type.elem_type:
            continue
        branches = [_branch(name, shapes.get(name), fixed, kind, names) for name in chosen]
        made = helper.make_node(
            "If", [condition], list(node.output), name=node.name, then_branch=branches[0], else_branch=branches[1]
        )
        made.metadata_props.extend(node.metadata_props)
        node.CopyFrom(made)
        done += 1
    return done


def _branch(
    source: str, sizes: Sizes | None, wanted: list[int], kind: onnx.ValueInfoProto, names: set[str]
) -> onnx.GraphProto:
    """A graph without inputs that gives ``source`` in the sizes that are wanted."""
    output, shape = fresh(f"{kind.name}/{source}", names), fresh(f"{kind.name}/{source}/shape", names)
    info = onnx.ValueInfoProto(name=output, type=kind.type)
    if sizes == tuple(wanted):
        return helper.make_graph([helper.make_node("Identity", [source], [output])], output, [], [info])
    constant = numpy_helper.from_array(np.asarray(wanted, np.int64), shape)
    return helper.make_graph([helper.make_node("Expand", [source, shape], [output])], output, [], [info], [constant])
