"""Which ONNX operator is which neutral operator: one table, `READ`.

A reader returns None to leave a node unknown: what it cannot be sure of (an unknown rank, an axis given by a tensor
that is not constant) is no operator of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from hasten.passes.onnx.element import name_of
from hasten.passes.pattern import OpView

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView


@dataclass
class Call:
    """One node and which of its outputs is asked for."""

    view: OnnxView
    node: Any
    value: str

    @property
    def output(self) -> int:
        return next(i for i, t in enumerate(self.node.outputs) if t.name == self.value)

    def input(self, slot: int) -> str | None:
        """Operand ``slot``; None where it is absent."""
        return (self.node.inputs[slot].name or None) if slot < len(self.node.inputs) else None

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def numbers(self, slot: int) -> list[Any] | None:
        """A constant operand as a list."""
        operand = self.input(slot)
        content = None if operand is None else self.view.constant(operand)
        return None if content is None else list(content.reshape(-1).tolist())

    def shape(self, slot: int = 0) -> tuple[Any, ...] | None:
        operand = self.input(slot)
        return None if operand is None else self.view.shape(operand)

    def listed(self, name: str, slot: int) -> tuple[list[int] | None, bool]:
        """A list, attribute ``name`` in older opsets and operand ``slot`` in newer ones; and whether it is readable."""
        if name in self.node.attrs:
            return list(self.attr(name)), True
        if self.input(slot) is None:
            return None, True
        return self.numbers(slot), self.numbers(slot) is not None

    def only_output_used(self) -> bool:
        """Whether nobody reads an output other than the one asked for."""
        return all(t.name in ("", self.value) or self.view.uses(t.name) == 0 for t in self.node.outputs)


Reader = Callable[[Call], "OpView[str] | None"]


def _operands(name: str, count: int) -> Reader:
    def reader(call: Call) -> OpView[str] | None:
        inputs = tuple(call.input(i) for i in range(count))
        if any(i is None for i in inputs) or len(call.node.inputs) > count:
            return None
        return OpView(name, inputs)

    return reader


def _where(call: Call) -> OpView[str] | None:
    """A choice; ``identity`` where a constant condition always chooses the same, of the result's shape."""
    condition = call.view.constant(str(call.input(0)))
    if condition is not None and condition.size and (condition.all() or not condition.any()):
        chosen = 1 if condition.all() else 2
        if call.shape(chosen) == call.view.shape(call.value):
            return OpView("identity", (call.input(chosen),))
    return OpView("where", (call.input(0), call.input(1), call.input(2)))


def _add(call: Call) -> OpView[str] | None:
    """A sum of two; ``identity`` where one is a constant 0 and the other has the result's shape."""
    inputs = (call.input(0), call.input(1))
    if len(call.node.inputs) != 2:
        return None
    for zero, other in ((0, 1), (1, 0)):
        content, shape = call.view.constant(str(inputs[zero])), call.shape(other)
        is_zero = content is not None and content.size > 0 and not content.any()
        if is_zero and shape is not None and shape == call.view.shape(call.value):
            return OpView("identity", (inputs[other],))
    return OpView("add", inputs)


def _merged_transpose(call: Call) -> OpView[str] | None:
    """The last two axes swapped while batch and heads are merged (the dynamo exporter's keys): a ``transpose``."""
    after, middle = call.view.shape(call.value), call.view.op(str(call.input(0)))
    if middle is None or middle.name != "transpose" or middle.attrs["perm"] != (0, 2, 1) or after is None:
        return None
    first = call.view.op(str(middle.inputs[0]))
    if first is None or first.name != "reshape":
        return None
    source, flat = str(first.inputs[0]), call.view.shape(str(middle.inputs[0]))
    before, rank = call.view.shape(source), len(after)
    if before is None or flat is None or rank < 3 or len(before) != rank:
        return None
    if before[:-2] != after[:-2] or before[-2:] != flat[1:] or before[-2:] != after[:-3:-1]:
        return None
    return OpView("transpose", (source,), {"perm": (*range(rank - 2), rank - 1, rank - 2)})


def _reshape(call: Call) -> OpView[str] | None:
    """A reshape; heads repeated for grouped queries (Unsqueeze, Expand, Reshape) are one ``repeat``."""
    after, below = call.view.shape(call.value), call.view.node(str(call.input(0)))
    if (whole := _merged_transpose(call)) is not None:
        return whole
    if after is None or below is None or below.op != "Expand" or below.domain:
        return _same_shape("reshape")(call)
    narrow, wide = call.view.shape(below.inputs[0].name), call.shape()
    above = call.view.node(below.inputs[0].name)
    if narrow is None or wide is None or above is None or above.op not in ("Unsqueeze", "Reshape") or above.domain:
        return _same_shape("reshape")(call)
    source = str(above.inputs[0].name)
    before = call.view.shape(source)
    for axis in range(len(after)):
        inserted = (*after[:axis], 0, 0, *after[axis + 1 :])
        if before is None or len(before) != len(after) or len(narrow) != len(wide) or len(wide) != len(inserted):
            break
        times, size = wide[axis + 1], before[axis]
        expected = (*before[: axis + 1], 1, *before[axis + 1 :])
        static = isinstance(times, int) and isinstance(size, int) and after[axis] == size * times
        if static and narrow == expected and wide == (*before[: axis + 1], times, *before[axis + 1 :]):
            attrs = {"axis": axis, "times": times}
            return OpView("identity", (source,)) if times == 1 else OpView("repeat", (source,), attrs)
    return _same_shape("reshape")(call)


def _same_shape(name: str) -> Reader:
    """``identity`` where nothing changes."""

    def reader(call: Call) -> OpView[str] | None:
        before = call.shape()
        same = before is not None and before == call.view.shape(call.value)
        return OpView("identity" if same else name, (call.input(0),))

    return reader


def _softmax(call: Call) -> OpView[str] | None:
    shape = call.shape()
    if shape is None or not shape:
        return None
    axis = call.attr("axis", -1 if call.view.opset >= 13 else 1) % len(shape)
    # Before opset 13 everything behind the axis was one: the same thing for the last axis only.
    if call.view.opset < 13 and axis != len(shape) - 1:
        return None
    return OpView("softmax", (call.input(0),), {"axis": axis})


def _cast(call: Call) -> OpView[str] | None:
    before, after = call.view.dtype(call.node.inputs[0].name), call.view.dtype(call.value)
    if call.node.op == "Cast":
        after = name_of(call.attr("to"))
    if after is None:
        return None
    return OpView("identity" if before == after else "cast", (call.input(0),), {} if before == after else {"to": after})


def _dropout(call: Call) -> OpView[str] | None:
    if call.output != 0:
        return None
    ratio = 0.5 if call.input(1) is None else (call.numbers(1) or [None])[0]
    if call.input(2) is not None and any(call.numbers(2) or [True]) and ratio != 0:
        return None
    return OpView("identity", (call.input(0),))


def _gelu(call: Call) -> OpView[str] | None:
    return OpView("gelu", (call.input(0),), {"approximate": call.attr("approximate", "none")})


def _fast_gelu(call: Call) -> OpView[str] | None:
    return OpView("gelu", (call.input(0),), {"approximate": "tanh"}) if call.input(1) is None else None


def _swish(call: Call) -> OpView[str] | None:
    """``x * sigmoid(alpha x)``: Swish, and ONNX Runtime's QuickGelu."""
    alpha = call.attr("alpha", 1.0 if call.node.op == "Swish" else 1.702)
    return OpView("silu", (call.input(0),)) if alpha == 1.0 else None


def _matmul(call: Call) -> OpView[str] | None:
    return OpView("matmul", (call.input(0), call.input(1)))


def _einsum(call: Call) -> OpView[str] | None:
    equation = "".join(str(call.attr("equation")).split())
    return OpView("einsum", tuple(t.name for t in call.node.inputs), {"equation": equation})


_ATTENTION_ATTRIBUTES = {
    "scale", "is_causal", "q_num_heads", "kv_num_heads", "softmax_precision", "qk_matmul_output_mode", "softcap",
}  # fmt: skip
"""What is understood; later opsets add windows and more."""


def plain_attention(view: OnnxView, value: str) -> bool:
    """Whether ``value`` is the one used output of an Attention without a cache, a soft cap or a float64 softmax."""
    call = Call(view, view.node(value), value)
    if not set(call.node.attrs) <= _ATTENTION_ATTRIBUTES:
        return False
    if any(call.input(slot) is not None for slot in (4, 5, 6)) or call.attr("softcap", 0.0) != 0.0:
        return False
    if call.attr("softmax_precision", 1) == onnx.TensorProto.DOUBLE and view.dtype(value) != "float64":
        return False
    return call.output == 0 and call.only_output_used()


def _attention(call: Call) -> OpView[str] | None:
    """Attention-23 and later on (B, H, N, D)."""
    shapes = [call.shape(slot) for slot in (0, 1, 2)]
    if any(s is None or len(s) != 4 for s in shapes) or not plain_attention(call.view, call.value):
        return None
    q, k = shapes[0], shapes[1]
    assert q is not None
    assert k is not None
    mask = call.input(3)
    if mask is not None:
        shape = call.view.shape(mask)
        # A mask that is narrower than the keys is padded by opset 24: it does not broadcast.
        if shape is None or (shape and shape[-1] != 1 and shape[-1] != k[2]) or len(shape) > 4:
            return None
        if shape and shape[-1] == 1 and k[2] != 1 and call.view.opset >= 24:
            return None
    attrs = {"scale": call.attr("scale"), "causal": bool(call.attr("is_causal", 0)), "gqa": q[1] != k[1]}
    return OpView("sdpa", (call.input(0), call.input(1), call.input(2), mask), attrs)


def _group_norm(call: Call) -> OpView[str] | None:
    """Scale and bias are per channel since opset 21; those per group of opset 18 are read repeated, where constant."""
    shape, weight = call.shape(), call.shape(1)
    groups = call.attr("num_groups")
    if shape is None or weight is None or len(weight) != 1 or not isinstance(shape[1], int):
        return None
    affine = [call.input(1), call.input(2)]
    if call.view.opset < 21 and groups != shape[1]:
        contents = [call.view.constant(str(a)) for a in affine]
        if any(c is None or c.shape != (groups,) for c in contents) or shape[1] % groups:
            return None
        wide = [np.repeat(c, shape[1] // groups) for c in contents if c is not None]
        affine = [call.view.made_up(call.value, slot, content) for slot, content in enumerate(wide)]
    elif weight[0] != shape[1]:
        return None
    attrs = {"groups": groups, "eps": call.attr("epsilon", 1e-5)}
    return OpView("group_norm", (call.input(0), *affine), attrs)


def _instance_norm(call: Call) -> OpView[str] | None:
    inputs = (call.input(0), call.input(1), call.input(2))
    return OpView("instance_norm", inputs, {"eps": call.attr("epsilon", 1e-5)})


def _reduction(name: str) -> Reader:
    def reader(call: Call) -> OpView[str] | None:
        shape, (axes, readable) = call.shape(), call.listed("axes", 1)
        if shape is None or not readable:
            return None
        keepdims = bool(call.attr("keepdims", 1))
        if not axes:
            if call.attr("noop_with_empty_axes", 0):
                return OpView("identity", (call.input(0),))
            axes = list(range(len(shape)))
        found = tuple(sorted(a % len(shape) for a in axes))
        return OpView(name, (call.input(0),), {"axes": found, "keepdims": keepdims})

    return reader


def _transpose(call: Call) -> OpView[str] | None:
    shape, perm = call.shape(), call.attr("perm")
    if perm is None and shape is None:
        return None
    perm = tuple(perm) if perm is not None else tuple(range(len(shape or ())))[::-1]
    if perm == tuple(range(len(perm))):
        return OpView("identity", (call.input(0),))
    return OpView("transpose", (call.input(0),), {"perm": perm})


def _part(axis: int, start: Any, size: Any, whole: Any, operand: str | None) -> OpView[str] | None:
    if not all(isinstance(n, int) for n in (start, size, whole)) or not size or whole % size or start % size:
        return None
    if size == whole:
        return OpView("identity", (operand,))
    return OpView("part", (operand,), {"axis": axis, "index": start // size, "parts": whole // size})


def _split(call: Call) -> OpView[str] | None:
    shape, (sizes, readable) = call.shape(), call.listed("split", 1)
    if shape is None or not readable:
        return None
    axis, index = call.attr("axis", 0) % len(shape), call.output
    whole, parts = shape[axis], len(call.node.outputs)
    if not isinstance(whole, int):
        return None
    if sizes is None:
        sizes = [-(-whole // parts)] * (parts - 1)
        sizes.append(whole - sum(sizes))
    return _part(axis, sum(sizes[:index]), sizes[index], whole, call.input(0))


def _slice(call: Call) -> OpView[str] | None:
    shape = call.shape()
    bounds = [call.numbers(slot) for slot in (1, 2)]
    optional = [call.numbers(slot) for slot in (3, 4)]
    if any(call.input(slot) is not None and n is None for slot, n in zip((3, 4), optional, strict=True)):
        return None
    if shape is None or bounds[0] is None or bounds[1] is None or len(bounds[0]) != 1:
        return None
    axis = (optional[0] or [0])[0] % len(shape)
    size = shape[axis]
    if (optional[1] or [1])[0] != 1 or not isinstance(size, int):
        return None
    start, end, _ = slice(int(bounds[0][0]), int(bounds[1][0])).indices(size)
    return _part(axis, start, end - start, size, call.input(0))


def _tile(call: Call) -> OpView[str] | None:
    """Tiling an axis of one element repeats it, the only case where tiling and repeating each element agree."""
    shape, times = call.shape(), call.numbers(1)
    if shape is None or times is None:
        return None
    longer = [a for a, t in enumerate(times) if t != 1]
    if not longer:
        return OpView("identity", (call.input(0),))
    if all(shape[a] == 1 for a in longer):
        return OpView("expand", (call.input(0),))
    return None


def _exact_nearest(call: Call) -> bool:
    """Whether whole upscaling factors repeat every pixel: the pairs of modes for which that is so."""
    mode = call.attr("coordinate_transformation_mode", "half_pixel")
    rounding = call.attr("nearest_mode", "round_prefer_floor")
    if mode == "asymmetric":
        return rounding in ("floor", "round_prefer_floor")
    return mode in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric") and rounding.startswith("round_prefer")


def _resize(call: Call) -> OpView[str] | None:
    before, after = call.shape(), call.view.shape(call.value)
    if before is None or len(before) < 3 or call.attr("mode", "nearest") != "nearest" or not _exact_nearest(call):
        return None
    rank, axes = len(before), call.attr("axes")
    places = [a % rank for a in axes] if axes is not None else list(range(rank))
    scales: list[Any] = [1] * rank
    if call.input(2) is not None and call.view.shape(str(call.input(2))) != (0,):
        given = call.numbers(2)
        if given is None or len(given) != len(places):
            return None
        for axis, scale in zip(places, given, strict=True):
            scales[axis] = scale
    else:
        if after is None or len(after) != rank or call.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
            return None
        for axis, (small, large) in enumerate(zip(before, after, strict=True)):
            whole = isinstance(small, int) and isinstance(large, int) and small > 0 and large % small == 0
            if not whole and small != large:
                return None
            scales[axis] = large // small if whole else 1
    if scales[:2] != [1, 1] or any(s != int(s) or s < 1 for s in scales):
        return None
    if all(s == 1 for s in scales):
        return OpView("identity", (call.input(0),))
    rounds = call.attr("coordinate_transformation_mode", "half_pixel") == "asymmetric"
    if rounds and call.attr("nearest_mode", "round_prefer_floor") != "floor" and max(scales) > 2:
        return None
    # pytorch_half_pixel reads pixel 0 for an axis of one output pixel; whole factors above 1 never give that.
    return OpView("upsample_nearest", (call.input(0),), {"scale": tuple(int(s) for s in scales[2:])})


def _same_pads(call: Call, shape: Any, kernel: Any, stride: Any, dilation: Any, lower: bool) -> list[int] | None:
    begins, ends = [], []
    for size, k, s, d in zip(shape[2:], kernel, stride, dilation, strict=True):
        if not isinstance(size, int):
            # With stride 1 the padding does not depend on the size.
            if s != 1:
                return None
            size = 1
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small = total // 2
        begins.append(total - small if lower else small)
        ends.append(small if lower else total - small)
    return begins + ends


def _convolution(call: Call) -> OpView[str] | None:
    shape, weight = call.shape(), call.shape(1)
    if weight is None or any(not isinstance(k, int) for k in weight[2:]):
        return None
    rank, kernel = len(weight) - 2, weight[2:]
    stride, dilation = call.attr("strides", [1] * rank), call.attr("dilations", [1] * rank)
    auto = call.attr("auto_pad", "NOTSET")
    pads: list[int] | None = list(call.attr("pads", [0] * (2 * rank)))
    if auto == "VALID":
        pads = [0] * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = None if shape is None else _same_pads(call, shape, kernel, stride, dilation, auto == "SAME_LOWER")
    if pads is None:
        return None
    attrs = {
        "stride": tuple(stride),
        "padding": tuple(pads),
        "dilation": tuple(dilation),
        "groups": call.attr("group", 1),
    }
    return OpView(f"conv{rank}d", (call.input(0), call.input(1), call.input(2)), attrs)


def _gemm(call: Call) -> OpView[str] | None:
    """A linear layer; its weight is stored either way."""
    if call.attr("alpha", 1.0) != 1.0 or call.attr("beta", 1.0) != 1.0 or call.attr("transA", 0):
        return None
    bias, weight = call.shape(2), call.shape(1)
    out_axis = 0 if call.attr("transB", 0) else 1
    if call.input(2) is not None and (bias is None or weight is None or bias != (weight[out_axis],)):
        return None
    return OpView("linear", (call.input(0), call.input(1), call.input(2)), {"out_axis": out_axis})


def _batch_norm(call: Call) -> OpView[str] | None:
    if call.output != 0 or call.view.opset < 9:
        return None
    training = bool(call.attr("training_mode", 0)) or len(call.node.outputs) > 1
    attrs = {"eps": call.attr("epsilon", 1e-5), "training": training}
    return OpView("batch_norm", tuple(call.input(slot) for slot in range(5)), attrs)


def _pad(call: Call) -> OpView[str] | None:
    """Pads as torch writes them: the last axis first, (before, after) pairs, untouched outer axes left out."""
    shape, (pads, readable) = call.shape(), call.listed("pads", 1)
    if shape is None or pads is None or not readable or call.attr("mode", "constant") != "constant":
        return None
    value = call.numbers(2) if call.input(2) is not None else [call.attr("value", 0.0)]
    axes, known = call.listed("axes", 3)
    if not value or not known:
        return None
    places = [a % len(shape) for a in axes] if axes is not None else list(range(len(shape)))
    pairs = [(0, 0)] * len(shape)
    for number, axis in enumerate(places):
        pairs[axis] = (int(pads[number]), int(pads[number + len(places)]))
    if all(p == (0, 0) for p in pairs):
        return OpView("identity", (call.input(0),))
    while pairs[0] == (0, 0):
        pairs.pop(0)
    return OpView("pad", (call.input(0),), {"pads": tuple(n for p in pairs[::-1] for n in p), "value": float(value[0])})


def _reciprocal(call: Call) -> OpView[str] | None:
    """1 / sqrt(x) in two nodes is one ``rsqrt`` to the rules."""
    operand = call.input(0)
    below = None if operand is None else call.view.node(operand)
    if below is not None and below.op == "Sqrt" and not below.domain:
        return OpView("rsqrt", (below.inputs[0].name,))
    return OpView("reciprocal", (operand,))


_STANDARD: dict[str, Reader] = {
    "Add": _add, "Sub": _operands("sub", 2), "Mul": _operands("mul", 2), "Div": _operands("div", 2),
    "Pow": _operands("pow", 2), "Neg": _operands("neg", 1), "Exp": _operands("exp", 1), "Erf": _operands("erf", 1),
    "Tanh": _operands("tanh", 1), "Sqrt": _operands("sqrt", 1), "Sigmoid": _operands("sigmoid", 1),
    "Not": _operands("logical_not", 1), "And": _operands("logical_and", 2), "Or": _operands("logical_or", 2),
    "Sum": _add, "Equal": _operands("eq", 2), "IsNaN": _operands("isnan", 1), "Where": _where,
    "Identity": _operands("identity", 1),
    "Reciprocal": _reciprocal,
    "Gelu": _gelu, "Swish": _swish,
    "Softmax": _softmax, "Cast": _cast, "CastLike": _cast, "Dropout": _dropout,
    "MatMul": _matmul, "Einsum": _einsum, "Attention": _attention,
    "GroupNormalization": _group_norm, "InstanceNormalization": _instance_norm,
    "ReduceMean": _reduction("mean"), "ReduceSum": _reduction("sum"), "ReduceMax": _reduction("max"),
    "Reshape": _reshape, "Flatten": _same_shape("reshape"), "Squeeze": _same_shape("reshape"),
    "Unsqueeze": _same_shape("reshape"), "Expand": _same_shape("expand"), "Tile": _tile, "Transpose": _transpose,
    "Split": _split, "Slice": _slice,
    "Resize": _resize, "Conv": _convolution, "Pad": _pad, "Gemm": _gemm, "BatchNormalization": _batch_norm,
}  # fmt: skip

_CONTRIB: dict[str, Reader] = {"Gelu": _operands("gelu", 1), "FastGelu": _fast_gelu, "QuickGelu": _swish}


def _contrib_gelu(call: Call) -> OpView[str] | None:
    return OpView("gelu", (call.input(0),), {"approximate": "none"})


READ: dict[tuple[str, str], Reader] = {
    **{("", op): reader for op, reader in _STANDARD.items()},
    **{("com.microsoft", op): reader for op, reader in _CONTRIB.items()},
    ("com.microsoft", "Gelu"): _contrib_gelu,
    ("hasten", "Gelu"): _gelu,
}
"""Domain and operator -> how it is read."""


def read(view: OnnxView, value: str) -> OpView[str] | None:
    """What makes ``value``, in the neutral vocabulary."""
    node = view.node(value)
    if node is None or view.is_final(value) or any(a.ref_attr_name for a in node.template.attribute):
        return None
    domain = node.domain or ""
    reader = READ.get(("" if domain == "ai.onnx" else domain, node.op))
    return None if reader is None else reader(Call(view, node, value))
