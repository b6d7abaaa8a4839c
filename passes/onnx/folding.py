"""The content of values that depend on no input: constants, and small computations on constants and static sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hasten.passes.onnx.detached import is_detached
from hasten.passes.onnx.element import numpy_type

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView

LARGEST = 1 << 20
"""Elements up to which a constant is looked into; the largest weight of a norm is far below, a linear layer's above."""
COMPUTED = 1 << 16
"""Elements up to which a result is computed."""

FOLDABLE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "ConstantOfShape",
        "Cos",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "Round",
        "Sigmoid",
        "Sign",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
"""Standard operators that are computed here: they read tensors, write tensors and draw no random numbers."""


def needs(view: OnnxView, value: str) -> list[str]:
    """The operands whose content decides the value's content; none where one is known not to be constant."""
    made_by = view.tensor(value).inputs
    if not made_by or made_by[0].domain not in (None, "", "ai.onnx"):
        return []
    node = made_by[0]
    if node.op == "CastLike":
        return [str(node.inputs[0].name)]
    if node.op not in FOLDABLE or any(t.name and not t.inputs and not isinstance(t, gs.Constant) for t in node.inputs):
        return []
    return [t.name for t in node.inputs if t.name]


def evaluate(view: OnnxView, value: str) -> npt.NDArray[Any] | None:
    """The value's content, or None where it depends on an input or is larger than `LARGEST`."""
    if value in view.owner.overridable:
        return None
    tensor = view.tensor(value)
    if isinstance(tensor, gs.Constant):
        return _content(tensor)
    if not tensor.inputs:
        return None
    node = tensor.inputs[0]
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op == "Constant":
        return _constant_node(node)
    if node.op == "CastLike":
        # Only the type of the second operand matters.
        content, wanted = view.constant(node.inputs[0].name), view.dtype(value)
        small = content is not None and content.size <= COMPUTED and wanted is not None
        return content.astype(numpy_type(str(wanted))) if small and content is not None else None
    if node.op == "Shape":
        return _static_shape(view, node)
    if node.op == "Size":
        shape = view.shape(node.inputs[0].name)
        known = shape is not None and all(isinstance(d, int) for d in shape)
        return np.asarray(math.prod(int(d) for d in shape or ()), dtype=np.int64) if known else None
    if (known_dims := _gathered_dims(view, node)) is not None:
        return known_dims
    if node.op not in FOLDABLE or not _small(view, value):
        return None
    operands = []
    for operand in node.inputs:
        content = None if operand.name == "" else view.constant(operand.name)
        if operand.name and content is None:
            return None
        operands.append(content)
    return _compute(view, node, operands, value)


def held(view: OnnxView, value: str) -> npt.NDArray[Any] | None:
    """The content of an initializer or a Constant of any size; None for everything else."""
    tensor = view.tensor(value)
    if value in view.owner.overridable:
        return None
    if isinstance(tensor, gs.Constant):
        return _content(tensor, math.inf)
    node = tensor.inputs[0] if tensor.inputs else None
    is_constant = node is not None and node.op == "Constant" and node.domain in (None, "", "ai.onnx")
    return _constant_node(node, math.inf) if is_constant else None


def _content(tensor: Any, largest: float = LARGEST) -> npt.NDArray[Any] | None:
    if isinstance(tensor._values, gs.ir.tensor.SparseValues) or math.prod(tensor.shape) > largest:
        return None
    # What is in a file stays there: `Constant.values` would keep what it reads.
    return np.asarray(tensor._values.load() if is_detached(tensor._values) else tensor.values)


def _constant_node(node: Any, largest: float = LARGEST) -> npt.NDArray[Any] | None:
    for attribute in node.template.attribute:
        if attribute.name == "value" and not attribute.ref_attr_name:
            too_large = math.prod(attribute.t.dims) > largest
            return None if too_large else np.asarray(onnx.numpy_helper.to_array(attribute.t))
        if attribute.ref_attr_name or attribute.name == "sparse_value":
            return None
        kind = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
        if attribute.name in kind:
            return np.asarray(onnx.helper.get_attribute_value(attribute), dtype=kind[attribute.name])
    return None


def _static_shape(view: OnnxView, node: Any) -> npt.NDArray[Any] | None:
    shape = view.shape(node.inputs[0].name)
    if shape is None:
        return None
    dims = shape[node.attrs.get("start", 0) :][: _length(len(shape), node)]
    return np.asarray(dims, dtype=np.int64) if all(isinstance(d, int) for d in dims) else None


def _length(rank: int, node: Any) -> int:
    start, end, _ = slice(node.attrs.get("start", 0), node.attrs.get("end")).indices(rank)
    return max(0, end - start)


def _gathered_dims(view: OnnxView, node: Any) -> npt.NDArray[Any] | None:
    """Static sizes picked out of a shape that is otherwise symbolic: Gather or Slice of a Shape."""
    if node.op not in ("Gather", "Slice") or not node.inputs[0].inputs:
        return None
    source = node.inputs[0].inputs[0]
    if source.op != "Shape" or source.domain not in (None, "", "ai.onnx"):
        return None
    shape = view.shape(source.inputs[0].name)
    if shape is None:
        return None
    start = slice(source.attrs.get("start", 0), source.attrs.get("end")).indices(len(shape))[0]
    dims = np.asarray(shape[start : start + _length(len(shape), source)], dtype=object)
    others = [view.constant(o.name) for o in node.inputs[1:]]
    if any(o is None for o in others) or node.attrs.get("axis", 0) != 0:
        return None
    numbers = [o for o in others if o is not None]
    if node.op == "Gather":
        picked = dims[numbers[0]]
    elif all(n.size == 1 for n in numbers) and (len(numbers) < 3 or int(numbers[2].item()) == 0):
        step = int(numbers[3].item()) if len(numbers) > 3 else 1
        picked = dims[slice(int(numbers[0].item()), int(numbers[1].item()), step)]
    else:
        return None
    picked = np.asarray(picked, dtype=object)
    if not all(isinstance(d, int) for d in picked.reshape(-1)):
        return None
    return picked.astype(np.int64)


def _small(view: OnnxView, value: str) -> bool:
    shape = view.shape(value)
    return shape is None or (all(isinstance(d, int) for d in shape) and math.prod(int(d) for d in shape) <= COMPUTED)


def _elements(op: str, operands: list[Any]) -> float:
    """How many elements an operator that can blow up its operands is about to make."""
    if op in ("ConstantOfShape", "Expand"):
        return math.prod(operands[-1].reshape(-1).tolist()) * (operands[0].size if op == "Expand" else 1)
    if op == "Tile":
        return int(operands[0].size) * math.prod(operands[1].reshape(-1).tolist())
    if op == "Range":
        start, limit, delta = (float(o) for o in operands)
        return abs((limit - start) / delta) if delta else math.inf
    return 0


def _compute(view: OnnxView, node: Any, operands: list[Any], value: str) -> npt.NDArray[Any] | None:
    from onnx.reference import ReferenceEvaluator

    if _elements(node.op, operands) > COMPUTED:
        return None
    proto = onnx.NodeProto()
    proto.CopyFrom(node.template)
    del proto.input[:], proto.output[:]
    if any(a.ref_attr_name for a in proto.attribute):
        return None
    names = [f"i{n}" if o is not None else "" for n, o in enumerate(operands)]
    proto.input.extend(names)
    proto.output.extend(t.name for t in node.outputs)
    graph = onnx.helper.make_graph(
        [proto],
        "fold",
        [onnx.ValueInfoProto(name=n) for n in names if n],
        [onnx.ValueInfoProto(name=value)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", view.opset)])
    with np.errstate(all="ignore"):
        try:
            (result,) = ReferenceEvaluator(model).run(None, {n: o for n, o in zip(names, operands, strict=True) if n})
        except (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError, KeyError):
            return None
    wanted = view.dtype(value)
    array = np.asarray(result)
    return array if array.size <= COMPUTED and (wanted is None or array.dtype.name == wanted) else None
