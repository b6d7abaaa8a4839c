"""What must hold of an ONNX graph after every pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from hasten.errors import VerificationError
from hasten.passes.onnx import functions

if TYPE_CHECKING:
    from hasten.passes.onnx.graph import OnnxGraph


def verify(graph: OnnxGraph) -> None:
    """Raise `VerificationError` unless every name is made once and before its use, and ONNX's checker agrees."""
    verify_model(graph.to_model(strip=True, infos=False))


def verify_model(model: onnx.ModelProto) -> None:
    """`verify` for a proto below 2 GB."""
    bodies = {(f.domain, f.name, f.overload) for f in model.functions}
    _names(model.graph, set(), set(), "")
    _operators(model.graph, bodies)
    for function in model.functions:
        made = set(function.input)
        _nodes(function.node, made, set(), f"{function.domain}.{function.name}/")
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=False)
        _check(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the graph is not valid ONNX: {_one_line(error)}") from error


def _check(model: onnx.ModelProto) -> None:
    """ONNX's checker. It insists on the rank of every graph input and output, which ONNX Runtime does not."""
    inferred = onnx.shape_inference.infer_shapes(model)
    for value in (*inferred.graph.input, *inferred.graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.CopyFrom(onnx.helper.make_sequence_type_proto(value.type))
    onnx.checker.check_model(inferred)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _names(proto: onnx.GraphProto, outer: set[str], all_names: set[str], path: str) -> None:
    made = {i.name for i in proto.input} | {i.name for i in proto.initializer}
    made |= {i.values.name for i in proto.sparse_initializer}
    all_names |= made
    _nodes(proto.node, made | outer, all_names, path)
    made |= {o for n in proto.node for o in n.output}
    for output in proto.output:
        if output.name not in made | outer:
            raise VerificationError(f"{path}{output.name}: a graph output that nothing makes")


def _nodes(nodes: list[onnx.NodeProto], made: set[str], all_names: set[str], path: str) -> None:
    for node in nodes:
        where = f"{path}{node.name or '/'.join(node.output)} ({node.op_type})"
        for name in node.input:
            if name and name not in made:
                raise VerificationError(f"{where}: reads {name!r}, which nothing makes before it")
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _names(inner, set(made), all_names, f"{path}{node.name or node.op_type}.{attribute.name}/")
        for name in node.output:
            if name and name in made:
                raise VerificationError(f"{where}: makes {name!r}, which something else makes as well")
            made.add(name)


def _operators(proto: onnx.GraphProto, bodies: set[tuple[str, str, str]]) -> None:
    for node in proto.node:
        if node.domain == functions.DOMAIN and (node.domain, node.op_type, node.overload) not in bodies:
            raise VerificationError(
                f"{node.name or node.output[0]}: hasten.{node.op_type} is an operator without a body"
            )
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _operators(attribute.g, bodies)
