"""From an `OnnxGraph` back to a proto, whole or without its large constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx
import onnx_graphsurgeon as gs

from hasten.passes.onnx import functions, types
from hasten.passes.onnx.tensors import tensors_of

if TYPE_CHECKING:
    from hasten.passes.onnx.graph import OnnxGraph, Scope

BIG = 1024
"""Bytes above which a constant is left out of models made for the checker and for shape inference."""


def write(
    graph: OnnxGraph, *, strip: bool, infos: bool, bodies: type[functions.Attached] = functions.Attached
) -> onnx.ModelProto:
    """The model. ``strip``: constants above `BIG` bytes become graph inputs; ``infos``: with inferred value infos."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.shell)
    writer = _Writer(graph, strip, infos, bodies(graph.opset))
    writer.graph(graph.main, model.graph)
    model.graph.input.extend(writer.left_out.values())
    for scope in graph.scopes:
        if scope.is_function:
            writer.function(scope, model.functions.add())
    writer.bodies.attach(model)
    if functions.DOMAIN not in writer.domains:
        ours = [o for o in model.opset_import if o.domain == functions.DOMAIN]
        for entry in ours:
            model.opset_import.remove(entry)
    return model


def signature(node: Any) -> functions.Signature:
    """What decides a fused operator's function body beside its attributes."""
    present = tuple(t.name != "" for t in node.inputs)
    dtypes = tuple(types.dtype_name(t) for t in node.inputs)
    shapes = tuple(None if t.name == "" or t.shape is None else tuple(t.shape) for t in node.inputs)
    return functions.Signature(present, dtypes, shapes)


class _Writer:
    """What stays the same while one model is written."""

    def __init__(self, owner: OnnxGraph, strip: bool, infos: bool, bodies: functions.Attached) -> None:
        self.owner, self.strip, self.infos = owner, strip, infos
        self.bodies = bodies
        self.left_out: dict[str, onnx.ValueInfoProto] = {}
        self.domains: set[str] = set()
        self.homes: dict[int, list[Any]] = {}
        for tensor, home in _homes(owner.scopes):
            self.homes.setdefault(id(home), []).append(tensor)

    def leave_out(self, info: onnx.ValueInfoProto) -> bool:
        """Make a constant an input of the main graph, wherever it is read; not if its name is taken there."""
        if info.name in self.left_out:
            return False
        self.left_out[info.name] = info
        return True

    def node(self, node: Any, proto: onnx.NodeProto, scope: Scope) -> None:
        graphs = {k: v for k, v in node.attrs.items() if isinstance(v, gs.Graph)}
        if graphs:
            template: onnx.NodeProto = node.template
            _take_over(template, proto, ("op_type", "domain", "doc_string", "overload"))
            proto.metadata_props.extend(template.metadata_props)
            for attribute in template.attribute:
                written = proto.attribute.add()
                if attribute.name in graphs:
                    written.name, written.type = attribute.name, onnx.AttributeProto.GRAPH
                    inner = next(s for s in self.owner.scopes if s.graph is graphs[attribute.name])
                    self.graph(inner, written.g)
                else:
                    written.CopyFrom(attribute)
        else:
            proto.CopyFrom(node.template)
        del proto.input[:], proto.output[:]
        if node.name:
            proto.name = node.name
        self.domains.add(proto.domain)
        proto.input.extend(t.name for t in node.inputs)
        proto.output.extend(t.name for t in node.outputs)
        if functions.is_fused(proto):
            proto.overload = self.bodies.overload(proto, signature(node))

    def graph(self, scope: Scope, proto: onnx.GraphProto) -> None:
        template = scope.template
        assert isinstance(template, onnx.GraphProto)
        _take_over(template, proto, ("name", "doc_string"))
        proto.metadata_props.extend(template.metadata_props)
        proto.input.extend(template.input)
        proto.output.extend(template.output)
        inputs = {i.name for i in template.input}
        for node in scope.graph.nodes:
            bulk = _bulky(node) if self.strip and node.op == "Constant" and not node.domain else None
            if bulk is None or not self.leave_out(bulk):
                self.node(node, proto.node.add(), scope)
        for tensor in self.homes.get(id(scope), []):
            values = tensor._values
            if isinstance(values, gs.ir.tensor.SparseValues):
                proto.sparse_initializer.append(values.tensor)
            elif self.strip and values.nbytes > BIG and (tensor.name in inputs or self.leave_out(_describe(tensor))):
                continue
            elif isinstance(values, gs.ir.tensor.LazyValues):
                written = proto.initializer.add()
                written.CopyFrom(values.tensor)
                written.name = tensor.name
            else:
                proto.initializer.append(onnx.numpy_helper.from_array(values, tensor.name))
        kept = {t.name for t in tensors_of(scope.graph)}
        proto.quantization_annotation.extend(a for a in template.quantization_annotation if a.tensor_name in kept)
        known = {v.name: v for v in template.value_info if v.name in kept}
        if self.infos:
            self.value_infos(scope, proto, known)
        else:
            proto.value_info.extend(known.values())

    def value_infos(self, scope: Scope, proto: onnx.GraphProto, known: Mapping[str, onnx.ValueInfoProto]) -> None:
        borders = {v.name for v in (*proto.input, *proto.output)}
        for node in scope.graph.nodes:
            for tensor in node.outputs:
                if not tensor.name or tensor.name in borders:
                    continue
                info = types.value_info(tensor)
                if info is None:
                    info = known.get(tensor.name)
                if info is not None:
                    proto.value_info.append(info)

    def function(self, scope: Scope, proto: onnx.FunctionProto) -> None:
        template = scope.template
        assert isinstance(template, onnx.FunctionProto)
        _take_over(template, proto, ("name", "domain", "overload", "doc_string"))
        for name in ("input", "output", "attribute", "attribute_proto", "metadata_props"):
            getattr(proto, name).extend(getattr(template, name))
        proto.opset_import.extend(template.opset_import)
        domains = {o.domain for o in proto.opset_import}
        # A function has no initializers: new constants become Constant nodes in front.
        for tensor in self.homes.get(id(scope), []):
            value = onnx.numpy_helper.from_array(tensor.values, tensor.name)
            proto.node.append(onnx.helper.make_node("Constant", [], [tensor.name], value=value))
        for node in scope.graph.nodes:
            self.node(node, proto.node.add(), scope)
            if (node.domain or "") not in domains:
                domains.add(node.domain or "")
                proto.opset_import.append(onnx.helper.make_opsetid(node.domain or "", 1))
        kept = {t.name for t in tensors_of(scope.graph)}
        proto.value_info.extend(v for v in template.value_info if v.name in kept)


def _take_over(template: Any, proto: Any, fields: tuple[str, ...]) -> None:
    for field in fields:
        if template.HasField(field):
            setattr(proto, field, getattr(template, field))


def _homes(scopes: list[Scope]) -> list[tuple[Any, Scope]]:
    readers: dict[int, tuple[Any, list[Scope]]] = {}
    for scope in scopes:
        for tensor in tensors_of(scope.graph):
            if isinstance(tensor, gs.Constant):
                readers.setdefault(id(tensor), (tensor, []))[1].append(scope)
    homes = []
    for tensor, scopes in readers.values():
        shared = [s for s in scopes[0].chain() if all(s in other.chain() for other in scopes[1:])]
        owner = next((s for s in shared if tensor.name in s.initializers), shared[0])
        homes.append((tensor, owner))
    return homes


def _bulky(node: Any) -> onnx.ValueInfoProto | None:
    """A Constant node above `BIG` bytes as a graph input."""
    value = node.attrs.get("value")
    if not isinstance(value, gs.Constant) or value._values.nbytes <= BIG:
        return None
    return onnx.helper.make_tensor_value_info(node.outputs[0].name, types.onnx_dtype(value), list(value.shape))


def _describe(tensor: Any) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(tensor.name, types.onnx_dtype(tensor), list(tensor.shape))
