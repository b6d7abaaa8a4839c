"""Shape and type inference by ONNX's own, for models of any size, local functions and new nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx
import onnx_graphsurgeon as gs

from hasten.passes.onnx import dims, export, functions, types

if TYPE_CHECKING:
    from hasten.passes.onnx.graph import OnnxGraph, Scope


def infer_graph(graph: OnnxGraph) -> None:
    """ONNX's inference over the model without its large constants; its results go to the tensors."""
    model = export.write(graph, strip=True, infos=False, bodies=functions.Shapes)
    for node in _nodes(model.graph):
        _see_through(node)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
    _take(graph, graph.main, inferred.graph)
    by_name = {(f.domain, f.name, f.overload): f for f in model.functions}
    for scope in graph.scopes:
        if scope.is_function:
            _infer_function(graph, scope, by_name, inferred)
    dims.unify(graph.scopes)


def _nodes(proto: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in proto.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(inner)


def _see_through(node: onnx.NodeProto) -> None:
    """ONNX defines GroupNormalization by a body that its inference does not enter; the result is like the input."""
    if node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx"):
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]


def _take(graph: OnnxGraph, scope: Scope, proto: onnx.GraphProto) -> None:
    infos = {v.name: v for v in (*proto.value_info, *proto.input, *proto.output)}
    tensors = [t for n in scope.graph.nodes for t in n.outputs]
    for tensor in (*scope.graph.inputs, *tensors):
        if (info := infos.get(tensor.name)) is not None:
            types.set_type(tensor, info.type)
    protos = {tuple(n.output): n for n in proto.node}
    for node in scope.graph.nodes:
        inner = {k: v for k, v in node.attrs.items() if isinstance(v, gs.Graph)}
        if not inner:
            continue
        written = protos[tuple(t.name for t in node.outputs)]
        for attribute in written.attribute:
            if attribute.name in inner:
                below = next(s for s in graph.scopes if s.graph is inner[attribute.name])
                _take(graph, below, attribute.g)


def _infer_function(graph: OnnxGraph, scope: Scope, by_name: Mapping[Any, Any], model: onnx.ModelProto) -> None:
    """A function's values get the types that all its call sites agree on."""
    template = scope.template
    calls = [
        node
        for other in graph.scopes
        for node in other.graph.nodes
        if (node.domain or "", node.op, node.template.overload) == (template.domain, template.name, template.overload)
    ]
    if not calls:
        return
    for slot, tensor in enumerate(scope.graph.inputs):
        operands = [c.inputs[slot] for c in calls if slot < len(c.inputs) and c.inputs[slot].name]
        dtypes = {types.onnx_dtype(o) for o in operands}
        if len(dtypes) != 1 or 0 in dtypes:
            continue
        tensor.dtype = dtypes.pop()
        shapes = [o.shape for o in operands]
        if all(s is not None and len(s) == len(shapes[0]) for s in shapes):
            tensor.shape = [d[0] if len(set(d)) == 1 else None for d in zip(*shapes, strict=True)]
    body = by_name[template.domain, template.name, template.overload]
    inner = onnx.ModelProto()
    inner.ir_version = max(model.ir_version, 8)
    inner.opset_import.extend(body.opset_import)
    inner.functions.extend(model.functions)
    inner.graph.node.extend(body.node)
    inner.graph.name = template.name
    inner.graph.input.extend(types.value_info(t) or onnx.ValueInfoProto(name=t.name) for t in scope.graph.inputs)
    inner.graph.output.extend(onnx.ValueInfoProto(name=t.name) for t in scope.graph.outputs)
    try:
        inferred = onnx.shape_inference.infer_shapes(inner, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError):
        return
    _take(graph, scope, inferred.graph)


_SAME = frozenset({"GroupNormAct", "Gelu", "BiasGelu", "FastGelu", "QuickGelu"})


def infer_node(node: Any, opsets: Iterable[onnx.OperatorSetIdProto]) -> None:
    """Types of a new node's outputs, from those of its inputs."""
    first = node.inputs[0] if node.inputs else None
    if node.domain in ("hasten", "com.microsoft"):
        if first is None or not types.known(first):
            return
        output = node.outputs[0]
        output.dtype = first.dtype
        shape = list(first.shape)
        if node.op in _SAME:
            output.shape = shape
        elif node.op == "Geglu":
            output.shape = [*shape[:-1], shape[-1] // 2 if isinstance(shape[-1], int) else None]
        elif node.op == "Attention" and node.domain == "hasten" and types.known(node.inputs[2]):
            output.shape = [*shape[:-1], node.inputs[2].shape[-1]]
        elif node.op == "UpsampleConv2d" and types.known(node.inputs[1]):
            large = [2 * d if isinstance(d, int) else None for d in shape[2:]]
            output.shape = [shape[0], node.inputs[1].shape[0], *large]
        return
    if node.domain or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return
    _infer_standard(node, list(opsets))


def _infer_standard(node: Any, opsets: list[onnx.OperatorSetIdProto]) -> None:
    version = next(o.version for o in opsets if o.domain in ("", "ai.onnx"))
    proto = onnx.NodeProto()
    proto.CopyFrom(node.template)
    proto.input.extend(t.name for t in node.inputs)
    proto.output.extend(t.name for t in node.outputs)
    known_types, data = {}, {}
    for tensor in node.inputs:
        if tensor.name and (info := types.value_info(tensor)) is not None:
            known_types[tensor.name] = info.type
            if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) <= 64:
                data[tensor.name] = onnx.numpy_helper.from_array(tensor.values, tensor.name)
    if any(t.name and t.name not in known_types for t in node.inputs):
        return
    try:
        schema = onnx.defs.get_schema(node.op, version, "")
        found = onnx.shape_inference.infer_node_outputs(schema, proto, known_types, data, opset_imports=opsets)
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
        return
    for tensor in node.outputs:
        if tensor.name in found:
            types.set_type(tensor, found[tensor.name])
