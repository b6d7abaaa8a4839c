"""Bodies of the fused operators of domain ``hasten``, in standard operators of the model's own opset.

A body is made for one set of attributes, operands and element types, so it holds no branch. A model with several of
them for one operator tells them apart by ``overload``. Bodies compute in float32 (float64 for float64) whatever the
element type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from hasten.passes.onnx import element
from hasten.passes.rules.norm_operands import OPERANDS

DOMAIN = "hasten"


@dataclass(frozen=True)
class Signature:
    """What decides a body beside the attributes: which operands there are, and their element types and shapes."""

    present: tuple[bool, ...]
    dtypes: tuple[str | None, ...]
    shapes: tuple[tuple[Any, ...] | None, ...] = ()
    native: bool = False

    def has(self, slot: int) -> bool:
        return slot < len(self.present) and self.present[slot]

    @property
    def compute(self) -> str:
        """The type that the body computes in: float32, float64 for float64, or as it comes where ``native``."""
        if self.native and self.dtypes[0] is not None:
            return self.dtypes[0]
        return "float64" if self.dtypes[0] == "float64" else "float32"

    def shape(self, slot: int) -> tuple[Any, ...] | None:
        return self.shapes[slot] if slot < len(self.shapes) else None


class Body:
    """Writes one function's nodes; the spelling of each operator follows the opset."""

    def __init__(self, opset: int) -> None:
        self.opset, self.nodes = opset, list[onnx.NodeProto]()

    def op(self, name: str, *inputs: str, **attrs: Any) -> str:
        return self.ops(name, 1, *inputs, **attrs)[0]

    def ops(self, name: str, count: int, *inputs: str, **attrs: Any) -> list[str]:
        outputs = [f"t{len(self.nodes)}" + (f"_{i}" if count > 1 else "") for i in range(count)]
        self.nodes.append(helper.make_node(name, list(inputs), outputs, **attrs))
        return outputs

    def constant(self, value: Any, dtype: str = "int64") -> str:
        array = np.asarray(value, dtype=element.numpy_type(dtype))
        return self.op("Constant", value=onnx.numpy_helper.from_array(array))

    def cast(self, x: str, to: str) -> str:
        return self.op("Cast", x, to=element.type_of(to))

    def unsqueeze(self, x: str, *axes: int) -> str:
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=list(axes))
        return self.op("Unsqueeze", x, self.constant(axes))

    def reduce(self, name: str, x: str, *axes: int) -> str:
        if self.opset < 18:
            return self.op(name, x, axes=list(axes), keepdims=1)
        return self.op(name, x, self.constant(axes), keepdims=1)

    def halves(self, x: str, axis: int) -> list[str]:
        extra = {"num_outputs": 2} if self.opset >= 18 else {}
        return self.ops("Split", 2, x, axis=axis, **extra)

    def dim(self, x: str, axis: int, rank: int) -> str:
        """One size as a vector of one element."""
        return self.op("Slice", self.op("Shape", x), self.constant([axis % rank]), self.constant([axis % rank + 1]))

    def activation(self, y: str, act: str, dtype: str) -> str:
        def number(value: float) -> str:
            return self.constant(value, dtype)

        if act == "silu":
            return self.op("Mul", y, self.op("Sigmoid", y))
        if act == "quick_gelu":
            return self.op("Mul", y, self.op("Sigmoid", self.op("Mul", y, number(1.702))))
        if act in ("gelu", "gelu_tanh"):
            # Gelu's own function body has constants of float32 precision.
            if self.opset >= 20 and dtype != "float64":
                return self.op("Gelu", y, approximate="tanh" if act == "gelu_tanh" else "none")
            if act == "gelu":
                inner = self.op("Erf", self.op("Mul", y, number(math.sqrt(0.5))))
            else:
                cube = self.op("Mul", self.op("Mul", y, y), self.op("Mul", y, number(0.044715)))
                inner = self.op("Tanh", self.op("Mul", self.op("Add", y, cube), number(math.sqrt(2 / math.pi))))
            return self.op("Mul", self.op("Mul", y, number(0.5)), self.op("Add", inner, number(1.0)))
        return y


def _up(body: Body, name: str, signature: Signature, slot: int) -> str:
    """Operand ``name`` in the type that the body computes in."""
    return name if signature.dtypes[slot] == signature.compute else body.cast(name, signature.compute)


def _down(body: Body, y: str, signature: Signature) -> str:
    """The result in the type of the first operand."""
    dtype = signature.dtypes[0]
    return y if dtype == signature.compute else body.op("Cast", y, to=element.type_of(dtype or "float32"))


def _normalise(body: Body, grouped: str, groups: int, eps: float, dtype: str) -> str:
    """(B, G, L) normalised over L."""
    if dtype == "float32":  # the type that runtimes have an InstanceNormalization kernel for
        ones, zeros = body.constant(np.ones(groups), dtype), body.constant(np.zeros(groups), dtype)
        return body.op("InstanceNormalization", grouped, ones, zeros, epsilon=eps)
    centred = body.op("Sub", grouped, body.reduce("ReduceMean", grouped, 2))
    spread = body.reduce("ReduceMean", body.op("Mul", centred, centred), 2)
    return body.op("Div", centred, body.op("Sqrt", body.op("Add", spread, body.constant(eps, dtype))))


def group_norm_act(body: Body, attrs: dict[str, Any], signature: Signature) -> str:
    """``act((group_norm(X) * weight + bias) * scale + shift)``; X (B, C, *spatial) is seen as (B, C, L)."""
    dtype, groups = signature.compute, int(attrs["groups"])
    # TensorRT 10.16 computes GroupNormalization of one group as an instance norm (NVIDIA/TensorRT issue 4756).
    if signature.native and body.opset >= 21 and groups > 1 and _channels(signature) is not None:
        return _group_normalization(body, attrs, signature)
    x = _up(body, "X", signature, 0)
    y = _normalise(body, body.op("Reshape", x, body.constant([0, groups, -1])), groups, float(attrs["eps"]), dtype)
    has_affine = any(signature.has(slot) for slot in (1, 2, 3, 4))
    if has_affine:
        flat = body.op("Reshape", x, body.constant([0, 0, -1]))
        y = body.op("Reshape", y, body.op("Shape", flat))
        slots = {slot: _up(body, name, signature, slot) for slot, name in enumerate(OPERANDS, 1) if signature.has(slot)}
        factor = body.unsqueeze(slots[1], 1) if 1 in slots else None
        offset = body.unsqueeze(slots[2], 1) if 2 in slots else None
        if 3 in slots:
            scale = body.op("Reshape", slots[3], body.constant([0, 0, 1]))
            factor = scale if factor is None else body.op("Mul", factor, scale)
            offset = None if offset is None else body.op("Mul", offset, scale)
        if 4 in slots:
            shift = body.op("Reshape", slots[4], body.constant([0, 0, 1]))
            offset = shift if offset is None else body.op("Add", offset, shift)
        y = y if factor is None else body.op("Mul", y, factor)
        y = y if offset is None else body.op("Add", y, offset)
    y = body.activation(y, attrs["act"], dtype)
    return _down(body, body.op("Reshape", y, body.op("Shape", "X")), signature)


def _channels(signature: Signature) -> int | None:
    """C where it is static and the affine, as far as there is one, is a vector."""
    shape = signature.shape(0)
    return shape[1] if shape is not None and isinstance(shape[1], int) else None


def _group_normalization(body: Body, attrs: dict[str, Any], signature: Signature) -> str:
    """With the standard operator (float32 statistics by its ``stash_type``), then scale, shift and activation."""
    channels, dtype = _channels(signature), signature.compute
    shape = signature.shape(0)
    assert shape is not None
    weight = _up(body, "weight", signature, 1) if signature.has(1) else body.constant(np.ones(channels or 0), dtype)
    bias = _up(body, "bias", signature, 2) if signature.has(2) else body.constant(np.zeros(channels or 0), dtype)
    y = body.op("GroupNormalization", "X", weight, bias, num_groups=int(attrs["groups"]), epsilon=float(attrs["eps"]))
    for slot, name, op in ((3, "scale", "Mul"), (4, "shift", "Add")):
        if signature.has(slot):
            ones = body.constant([0, 0, *(1,) * (len(shape) - 2)])
            y = body.op(op, y, body.op("Reshape", _up(body, name, signature, slot), ones))
    return body.activation(y, attrs["act"], dtype)


def geglu(body: Body, attrs: dict[str, Any], signature: Signature) -> str:
    """(…, 2C) -> (…, C): one half times GELU of the other."""
    first, second = body.halves(_up(body, "X", signature, 0), -1)
    value, gate = (second, first) if attrs["gate_first"] else (first, second)
    act = "gelu_tanh" if attrs["approximate"] == "tanh" else "gelu"
    return _down(body, body.op("Mul", value, body.activation(gate, act, signature.compute)), signature)


def gelu(body: Body, attrs: dict[str, Any], signature: Signature) -> str:
    act = "gelu_tanh" if attrs["approximate"] == "tanh" else "gelu"
    return _down(body, body.activation(_up(body, "X", signature, 0), act, signature.compute), signature)


def attention(body: Body, attrs: dict[str, Any], signature: Signature) -> str:
    """Q (B, H, N, D), K (B, Hk, M, D), V (B, Hk, M, Dv), mask broadcast to (B, H, N, M) -> (B, H, N, Dv)."""
    dtype = signature.compute
    q, k, v = (_up(body, name, signature, slot) for slot, name in enumerate("QKV"))
    q = body.op("Mul", q, body.constant(float(attrs["scale"]), dtype))
    grouped = _may_be_grouped(signature)
    if grouped:
        # Query head h reads key head h // (H / Hk): the queries of one key head lie side by side.
        heads, width = body.dim("K", 1, 4), body.dim("Q", 3, 4)
        q = body.op("Reshape", q, body.op("Concat", body.constant([0]), heads, body.constant([-1]), width, axis=0))
    scores = body.op("MatMul", q, body.op("Transpose", k, perm=[0, 1, 3, 2]))
    if grouped:
        sizes = [body.dim("Q", 0, 4), body.dim("Q", 1, 4), body.dim("Q", 2, 4), body.dim("K", 2, 4)]
        size = body.op("Concat", *sizes, axis=0)
        scores = body.op("Reshape", scores, size)
    mask, is_bool = _mask(body, attrs, signature)
    if mask is not None and is_bool:
        scores = body.op("Where", mask, scores, body.constant(-np.inf, dtype))
    elif mask is not None:
        scores = body.op("Add", scores, mask)
    weights = _softmax(body, scores, signature)
    if grouped:
        folded = body.op(
            "Concat", body.dim("K", 0, 4), body.dim("K", 1, 4), body.constant([-1]), body.dim("K", 2, 4), axis=0
        )
        weights = body.op("Reshape", weights, folded)
    y = body.op("MatMul", weights, v)
    if grouped:
        shape = [body.dim("Q", axis, 4) for axis in (0, 1, 2)]
        y = body.op("Reshape", y, body.op("Concat", *shape, body.dim("V", 3, 4), axis=0))
    if mask is not None and signature.has(3):
        # A causal mask alone leaves every row its first key.
        numbers = body.cast(mask, "float32") if is_bool else mask
        lowest = body.constant(0, "float32") if is_bool else body.constant(-np.inf, dtype)
        alone = body.op("Equal", body.reduce("ReduceMax", numbers, -1), lowest)
        y = body.op("Where", alone, body.constant(0, dtype), y)
    return _down(body, y, signature)


def _softmax(body: Body, scores: str, signature: Signature) -> str:
    """Over the last axis, in float32 at least."""
    if signature.compute not in ("float16", "bfloat16"):
        return body.op("Softmax", scores, axis=3)
    return body.cast(body.op("Softmax", body.cast(scores, "float32"), axis=3), signature.compute)


def _mask(body: Body, attrs: dict[str, Any], signature: Signature) -> tuple[str | None, bool]:
    """One mask of the given and the causal one, and whether it is bool (True: may attend) or added to the scores."""
    given = signature.has(3)
    is_bool = not given or signature.dtypes[3] == "bool"
    mask = None if not given else "mask" if is_bool else _up(body, "mask", signature, 3)
    if mask is not None and signature.shape(3) == ():
        mask = body.unsqueeze(mask, 0)
    if not attrs["causal"]:
        return mask, is_bool
    rows, columns = (
        body.op("Range", body.constant(0), body.op("Squeeze", body.dim(name, 2, 4)), body.constant(1)) for name in "QK"
    )
    before = body.op("Not", body.op("Less", body.unsqueeze(rows, 1), columns))
    if mask is None:
        return before, True
    if is_bool:
        return body.op("And", mask, before), True
    return body.op("Where", before, mask, body.constant(-np.inf, signature.compute)), False


def _may_be_grouped(signature: Signature) -> bool:
    q, k = signature.shape(0), signature.shape(1)
    return q is None or k is None or len(q) != 4 or len(k) != 4 or q[1] != k[1] or q[1] is None


def upsample_conv2d(body: Body, attrs: dict[str, Any], signature: Signature) -> str:
    """Nearest 2x upsampling and a 3x3 convolution as four 2x2 convolutions of the small map, one for each output phase.

    One axis: out[2i] = w0 x[i-1] + (w1 + w2) x[i], out[2i+1] = (w0 + w1) x[i] + w2 x[i+1].
    """
    x, w = _up(body, "X", signature, 0), _up(body, "W", signature, 1)
    bias = [_up(body, "B", signature, 2)] if signature.has(2) else []
    phases = []
    for row, rows in enumerate(_phases(body, w, 2)):
        for column, kernel in enumerate(_phases(body, rows, 3)):
            pads = [1 - row, 1 - column, row, column]
            phases.append(body.op("Conv", x, kernel, *bias, kernel_shape=[2, 2], pads=pads))
    y = body.op("DepthToSpace", body.op("Concat", *phases, axis=1), blocksize=2, mode="DCR")
    return _down(body, y, signature)


def _phases(body: Body, w: str, axis: int) -> list[str]:
    """The taps of both phases along one axis of the kernel: (w0, w1 + w2) and (w0 + w1, w2)."""
    taps = [
        body.op("Slice", w, body.constant([tap]), body.constant([tap + 1]), body.constant([axis])) for tap in range(3)
    ]
    even = body.op("Concat", taps[0], body.op("Add", taps[1], taps[2]), axis=axis)
    odd = body.op("Concat", body.op("Add", taps[0], taps[1]), taps[2], axis=axis)
    return [even, odd]


@dataclass(frozen=True)
class Fused:
    """One operator: operand and attribute names in order, and how its body is written."""

    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    write: Callable[[Body, dict[str, Any], Signature], str]


FUSED = {
    "GroupNormAct": Fused(("X", *OPERANDS), ("groups", "eps", "act"), group_norm_act),
    "Geglu": Fused(("X",), ("approximate", "gate_first"), geglu),
    "Gelu": Fused(("X",), ("approximate",), gelu),
    "Attention": Fused(("Q", "K", "V", "mask"), ("scale", "causal"), attention),
    "UpsampleConv2d": Fused(("X", "W", "B"), (), upsample_conv2d),
}


def is_fused(proto: onnx.NodeProto) -> bool:
    """Whether a node is one of the fused operators that have a body here."""
    return proto.domain == DOMAIN and proto.op_type in FUSED


def is_ours(function: onnx.FunctionProto) -> bool:
    """Whether a function is a body that is made here, and therefore made anew."""
    return function.domain == DOMAIN and function.name in FUSED


def write(op: str, attrs: dict[str, Any], signature: Signature, opset: int) -> onnx.FunctionProto:
    """The body of fused operator ``op`` for one signature."""
    fused, body = FUSED[op], Body(opset)
    last = fused.write(body, attrs, signature)
    body.nodes.append(helper.make_node("Identity", [last], ["Y"]))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, op, fused.inputs, ["Y"], body.nodes, opsets, attributes=list(fused.attributes))


@dataclass
class Attached:
    """The bodies that one model needs, gathered while its nodes are written."""

    opset: int
    bodies: dict[str, dict[str, onnx.FunctionProto]] = field(default_factory=dict)

    def overload(self, proto: onnx.NodeProto, signature: Signature) -> str:
        """The name under which the node's body is found."""
        attrs = {a.name: plain(helper.get_attribute_value(a)) for a in proto.attribute}
        of_op = self.bodies.setdefault(proto.op_type, {})
        body = write(proto.op_type, attrs, signature, self.opset)
        key = body.SerializeToString(deterministic=True).hex()
        if key not in of_op:
            body.overload = _label(proto.op_type, attrs, signature, {b.overload for b in of_op.values()})
            of_op[key] = body
        return of_op[key].overload

    def attach(self, model: onnx.ModelProto) -> None:
        """Add the bodies. An operator with one body only needs no overload, which older readers do not know."""
        single = {op for op, of_op in self.bodies.items() if len(of_op) == 1}
        for op, of_op in sorted(self.bodies.items()):
            for body in of_op.values():
                if op in single:
                    body.overload = ""
                model.functions.append(body)
        if single:
            clear_overloads(model, single)
        if self.bodies.keys() - single:
            model.ir_version = max(model.ir_version, 10)
        if self.bodies:
            model.ir_version = max(model.ir_version, 8)
            if DOMAIN not in {o.domain for o in model.opset_import}:
                model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def clear_overloads(model: onnx.ModelProto, ops: set[str]) -> None:
    """Let the nodes of ``ops`` name no overload."""

    def walk(nodes: Any) -> None:
        for node in nodes:
            if node.domain == DOMAIN and node.op_type in ops:
                node.overload = ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    walk(attribute.g.node)

    walk(model.graph.node)
    for function in model.functions:
        walk(function.node)


def scalar(value: float, dtype: str) -> npt.NDArray[Any]:
    """A number as an array without axes."""
    return np.asarray(value, dtype=element.numpy_type(dtype))


def plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _label(op: str, attrs: dict[str, Any], signature: Signature, taken: set[str]) -> str:
    """A readable name: ``silu_float16``, with a number where there are several."""
    words = [str(v) for v in attrs.values() if isinstance(v, str)] + [signature.dtypes[0] or "unknown"]
    base = name = "_".join(words)
    number = 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


class Shapes(Attached):
    """Instead of the bodies, ones that have the right types and shapes only: for inference, before types are known.

    ONNX Runtime's own operators get such bodies too, so that inference sees through them.
    """

    def overload(self, proto: onnx.NodeProto, signature: Signature) -> str:
        self.bodies.setdefault(proto.op_type, {})
        return ""

    def attach(self, model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", self.opset)]
        for op in sorted(self.bodies):
            body = Body(self.opset)
            body.nodes.append(helper.make_node("Identity", [_shape_body(body, op)], ["Y"]))
            model.functions.append(helper.make_function(DOMAIN, op, FUSED[op].inputs, ["Y"], body.nodes, opsets))
        domains = {o.domain for o in model.opset_import}
        if self.bodies and DOMAIN not in domains:
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        present = {(f.domain, f.name) for f in model.functions}
        for op in _CONTRIB_SAME if "com.microsoft" in domains else ():
            if ("com.microsoft", op) not in present:
                nodes = [helper.make_node("Identity", ["X"], ["Y"])]
                model.functions.append(helper.make_function("com.microsoft", op, ["X", "bias"], ["Y"], nodes, opsets))
        model.ir_version = max(model.ir_version, 8)


_CONTRIB_SAME = ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")


def _shape_body(body: Body, op: str) -> str:
    if op == "Geglu":
        return body.halves("X", -1)[0]
    if op == "Attention":
        column = body.op("Slice", "Q", body.constant([0]), body.constant([1]), body.constant([3]))
        row = body.op("Slice", "V", body.constant([0, 0]), body.constant([1, 1]), body.constant([1, 2]))
        return body.op("MatMul", column, row)
    if op == "UpsampleConv2d":
        mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
        twice = body.constant([1, 1, 2, 2], "float32")
        return body.op("Conv", body.op("Resize", "X", "", twice, **mode), "W", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return "X"
