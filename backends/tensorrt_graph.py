"""What TensorRT's parser and builder need of an ONNX graph that other runtimes do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError

if TYPE_CHECKING:
    import onnx

MAX_TOPK = 3840
_CONTRIB = "com.microsoft"
_IMPORTED_CONTRIB = frozenset(
    {
        "Gelu",
        "MatMulNBits",
        "MultiHeadAttention",
        "QMoE",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
_STANDARD = frozenset({"", "ai.onnx", "trt"})
_ATTENTION = frozenset({("", "Attention"), ("ai.onnx", "Attention"), (_CONTRIB, "MultiHeadAttention")})


@dataclass(frozen=True)
class _Place:
    """Nodes that can be inserted into (a graph's or a function's), and whether they run inside control flow."""

    nodes: Any
    in_control_flow: bool


def prepare_for_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto:
    """Change ``model`` in place so that TensorRT builds it, and return it; `HastenError` for what it cannot build.

    Every attention in straight-line code gets ``TRT_decomposable=1`` (without it float32 and wide heads do not build)
    and query, key and value that are distinct tensors (one tensor for all three crashes the builder). Refused, with
    the node's name: attention inside If, Loop or Scan, attention with a cache, a second output or softcap, TopK of
    more than 3840, operators that the parser has no importer for.
    """
    constants = {t.name: t for t in model.graph.initializer}
    functions = {(f.domain, f.name): f for f in model.functions}
    for place in _places(model.graph.node, functions, in_control_flow=False, seen=set()):
        numbers: dict[str, int] = {}
        for node in list(place.nodes):
            _check_known(node, functions)
            if (node.domain, node.op_type) in _ATTENTION:
                _check_attention(node, place)
                _decomposable(node)
                numbers = numbers or _value_numbers(place.nodes)
                query, key = node.input[0], node.input[1]
                if key and numbers.get(query, query) == numbers.get(key, key):
                    _part_key_from_query(node, place.nodes)
            elif node.op_type == "TopK" and node.domain in _STANDARD:
                _check_topk(node, constants)
    return model


def _places(
    nodes: Any, functions: dict[tuple[str, str], Any], *, in_control_flow: bool, seen: set[tuple[str, str, bool]]
) -> Iterator[_Place]:
    """Walk node lists: the graph's, those of branches and bodies, and those of functions that are called."""
    yield _Place(nodes, in_control_flow)
    for node in list(nodes):
        for graph in _subgraphs(node):
            yield from _places(graph.node, functions, in_control_flow=True, seen=seen)
        key = (node.domain, node.op_type)
        if key in functions and (*key, in_control_flow) not in seen:
            seen.add((*key, in_control_flow))
            yield from _places(functions[key].node, functions, in_control_flow=in_control_flow, seen=seen)


def _subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_known(node: onnx.NodeProto, functions: dict[tuple[str, str], Any]) -> None:
    if (node.domain, node.op_type) in functions or node.domain in _STANDARD:
        return
    if node.domain == _CONTRIB and node.op_type in _IMPORTED_CONTRIB:
        return
    raise HastenError(
        f"{_where(node)}: TensorRT's ONNX parser has no importer for {node.domain}.{node.op_type}; use standard "
        "operators, or give the model a function of that name"
    )


def _check_attention(node: onnx.NodeProto, place: _Place) -> None:
    if place.in_control_flow:
        raise HastenError(
            f"{_where(node)}: TensorRT's attention layer cannot stand inside If, Loop or Scan; spell it out as MatMul, "
            "Softmax, MatMul, which is fused into the same kernel"
        )
    if node.op_type != "Attention":
        return
    if any(node.output[1:]) or any(node.input[4:]):
        raise HastenError(f"{_where(node)}: TensorRT imports attention with one output and no key-value cache only")
    if any(a.name == "softcap" and a.f != 0 for a in node.attribute):
        raise HastenError(f"{_where(node)}: TensorRT does not import attention with softcap")


def _decomposable(node: onnx.NodeProto) -> None:
    if not any(a.name == "TRT_decomposable" for a in node.attribute):
        from onnx import helper

        node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def _value_numbers(nodes: Any) -> dict[str, int]:
    """Give equal numbers to values that the builder will find equal: it drops Identity and merges equal nodes."""
    numbers: dict[str, int] = {}
    seen: dict[Any, int] = {}
    for node in nodes:
        inputs = tuple(numbers.setdefault(name, len(numbers) + len(seen)) for name in node.input)
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        for index, name in enumerate(node.output):
            if node.op_type == "Identity":
                numbers[name] = inputs[0]
            else:
                key = (node.domain, node.op_type, attributes, inputs, index)
                numbers[name] = seen.setdefault(key, len(numbers) + len(seen))
    return numbers


def _part_key_from_query(node: onnx.NodeProto, nodes: Any) -> None:
    """Put Max(k, k) before the key: it changes no value, NaN included, and the builder does not see through it."""
    from onnx import helper

    name = node.input[1]
    copy, label = f"{name}_{node.output[0]}_key", f"{node.name or node.output[0]}_key"
    at = next(i for i, other in enumerate(nodes) if other == node)
    nodes.insert(at, helper.make_node("Max", [name, name], [copy], name=label))
    nodes[at + 1].input[1] = copy


def _check_topk(node: onnx.NodeProto, constants: dict[str, Any]) -> None:
    from onnx import numpy_helper

    if node.input[1] in constants:
        count = int(numpy_helper.to_array(constants[node.input[1]]).reshape(-1)[0])
        if count > MAX_TOPK:
            raise HastenError(f"{_where(node)}: K is {count}, and TensorRT takes at most {MAX_TOPK}; keep fewer")


def _where(node: onnx.NodeProto) -> str:
    return f"node {node.name or (node.output[0] if node.output else '')!r} ({node.op_type})"
