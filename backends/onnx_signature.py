"""The inputs and outputs of an ONNX model: their names, dtypes and sizes, as a manifest has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hasten.backends.manifest import Dim, TensorSpec
from hasten.backends.shapes import Profile, multiple
from hasten.errors import HastenError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs, the range of every symbolic size that an input names, and arguments that were frozen."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, tuple[int, int | None]]
    constants: Mapping[str, Any] = field(default_factory=dict)


def signature(model: onnx.ModelProto) -> Signature:
    """Read it off the graph. A size without a name is called after its tensor and axis; initializers are no inputs."""
    held = {t.name for t in model.graph.initializer}
    inputs = tuple(_spec(v) for v in model.graph.input if v.name not in held)
    outputs = tuple(_spec(v) for v in model.graph.output)
    symbols = [(scaled[1] if (scaled := multiple(d)) else d) for t in inputs for d in t.shape if isinstance(d, str)]
    return Signature(inputs, outputs, dict.fromkeys(dict.fromkeys(symbols), (1, None)))


def fix_shapes(model: onnx.ModelProto, profiles: Mapping[str, Profile]) -> None:
    """Write sizes whose min and max agree into the inputs, and into every value of the same symbol, in place."""
    fixed: dict[str, int] = {}
    for value in model.graph.input:
        if value.name not in profiles:
            continue
        profile = profiles[value.name]
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if profile.min[axis] != profile.max[axis]:
                continue
            if dim.dim_param and fixed.setdefault(dim.dim_param, profile.opt[axis]) != profile.opt[axis]:
                raise HastenError(
                    f"shapes: size {dim.dim_param!r} is {fixed[dim.dim_param]} in one input and {profile.opt[axis]} in "
                    f"input {value.name!r}"
                )
            if not dim.dim_param:
                dim.dim_value = profile.opt[axis]
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]


def check_dynamic(wanted: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """Refuse an export that holds for the example's sizes only where the captured graph was dynamic."""
    for spec, got in zip(wanted, found, strict=True):
        for axis, (size, fixed) in enumerate(zip(spec.shape, got.shape, strict=True)):
            if isinstance(size, str) and isinstance(fixed, int):
                raise HastenError(
                    f"dimension {axis} of input {spec.name!r} shall be dynamic, and the export holds for {fixed} "
                    "only; make it fixed, or find the pass that fixed it with --skip"
                )


def rename(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Rename the graph's inputs and outputs in place, by position, everywhere they are used.

    A graph cannot give an output the name of an input, as diffusers' UNets do with ``sample``: the output is then
    called ``out_sample`` in the graph, and runners tell outputs by position.
    """
    found_in = [v.name for v in model.graph.input]
    found_out = [v.name for v in model.graph.output]
    if len(found_in) != len(inputs) or len(found_out) != len(outputs):
        raise HastenError(
            f"the export has inputs {', '.join(found_in)} and outputs {', '.join(found_out)}; the captured graph has "
            f"{', '.join(inputs)} and {', '.join(outputs)}"
        )
    apart = [f"out_{name}" if name in inputs else name for name in outputs]
    names = {**dict(zip(found_out, apart, strict=True)), **dict(zip(found_in, inputs, strict=True))}
    names = {old: new for old, new in names.items() if old != new}
    if not names:
        return
    taken = {n for node in model.graph.node for n in (*node.input, *node.output)} | {
        t.name for t in model.graph.initializer
    }
    for new in list(names.values()):
        if new in taken and new not in names:
            names[new] = _free(f"{new}_inner", taken | set(names.values()))
    _rename_graph(model.graph, names)


def _rename_graph(graph: Any, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename_graph(inner, names)


def _free(name: str, taken: Iterable[str]) -> str:
    used = set(taken)
    number = 1
    while f"{name}_{number}" in used:
        number += 1
    return f"{name}_{number}"


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    import onnx

    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.elem_type:
        raise HastenError(f"the model's {value.name!r} is no tensor of a known type")
    name = onnx.TensorProto.DataType.Name(kind.elem_type)
    if not kind.HasField("shape"):
        raise HastenError(f"the model's {value.name!r} has no shape; run ONNX shape inference on the model first")
    return TensorSpec(value.name, _DTYPES.get(name, name.lower()), tuple(_dims(value.name, kind.shape.dim)))


_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


def _dims(name: str, dims: Iterable[Any]) -> Iterable[Dim]:
    for axis, dim in enumerate(dims):
        yield dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or f"{name}_{axis}")
