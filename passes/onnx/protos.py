"""What the surgery on a model is done with: nodes and value infos, and what is known of the model's values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from hasten.errors import HastenError
from hasten.passes.onnx.element import type_of
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.onnx.traced import RULE, Value, rename
from hasten.passes.onnx.view import OnnxView


class Known:
    """Types and sizes of the values of a model's main graph, and the symbols that are sizes of its inputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        owner = OnnxGraph(model)
        self._view = OnnxView(owner, owner.main)
        sizes = [d for v in model.graph.input for d in v.type.tensor_type.shape.dim]
        self.symbols = frozenset(d.dim_param for d in sizes if d.dim_param)

    def value(self, name: str) -> Value:
        dtype, shape = self._view.dtype(name), self._view.shape(name)
        if dtype is None or shape is None:
            raise HastenError(f"{name} has no known type and number of dimensions, so it cannot be kept")
        return Value(name, dtype, shape)


def settled(size: str, symbols: frozenset[str]) -> bool:
    """Whether a symbolic size is arithmetic on ``symbols``.

    >>> settled("4*batch", frozenset({"batch"})), settled("unk__0", frozenset({"batch"}))
    (True, False)
    """
    named = re.findall(r"[^\W\d]\w*", size)
    return size in symbols or (":" not in size and all(name in symbols for name in named))


def info(value: Value) -> onnx.ValueInfoProto:
    """What a graph says of one of its inputs or outputs."""
    return helper.make_tensor_value_info(value.name, type_of(value.dtype), list(value.shape))


def node(op: str, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    """A node of a step cache, without attributes."""
    made = helper.make_node(op, inputs, [output], name=f"{output}/{op}")
    made.metadata_props.add(key="hasten.rule", value=RULE)
    return made


def identity(source: str, name: str) -> onnx.NodeProto:
    """The same value under another name."""
    return node("Identity", [source], name)


def renamed(original: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy with other names for some values."""
    copy = onnx.NodeProto()
    copy.CopyFrom(original)
    rename(copy, names)
    return copy


def copied(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """A copy of what is known of a value."""
    made = onnx.ValueInfoProto()
    made.CopyFrom(value)
    return made


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model with its inputs and functions, and neither nodes, initializers nor outputs."""
    made = onnx.ModelProto()
    _copy_fields(model, made, {"graph"})
    _copy_fields(model.graph, made.graph, {"node", "initializer", "value_info", "output"})
    return made


def _copy_fields(source: Any, copy: Any, left_out: set[str]) -> None:
    for field, value in source.ListFields():
        if field.name in left_out:
            continue
        if hasattr(value, "extend"):
            getattr(copy, field.name).extend(value)
        else:
            setattr(copy, field.name, value)
