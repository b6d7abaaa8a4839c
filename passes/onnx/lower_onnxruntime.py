"""What ONNX Runtime gets: the spelling that was fastest on a CPU of those that are exact.

Measured with ONNX Runtime 1.32, 2 threads, float32, milliseconds (20th percentile of 31 interleaved runs):

- attention, 1x8 heads of 40, 256 rows: MatMul-Softmax-MatMul 0.57, Attention-23 4-D 0.58, 3-D 0.48, MultiHeadAttention
  0.56; 1024 rows: 103, 87, 78, 45; 1024 rows and 77 keys: 1.03, 1.06, 0.83, 1.02; bool mask: 1.83, 0.89, 0.74, 0.71.
- GroupNorm and SiLU, 1x320x32x32: GroupNormalization 0.31, Reshape+InstanceNormalization+Mul+Add 0.19, with the affine
  as one BatchNormalization 0.17; 2x128x64x64: 1.25, 0.84, 0.77.
- GELU of 256x2560: erf chain 0.45, Gelu-20 0.26, com.microsoft.Gelu 0.25.
- upsample + 3x3 convolution, 320 channels 32x32: Resize+Conv 165, ConvTranspose 96, four 2x2 Conv 106; 256 channels
  2x64x64: 320, 269, 194. The kernels of the four are computed once, when the model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.passes.onnx import contrib, lower_sums
from hasten.passes.onnx.inline import inline
from hasten.passes.onnx.lowering import Left, Lowered, attributes, heads_last, merged, only_user, operands

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView
    from hasten.passes.pipeline import Context

FLASH_FROM = 1 << 20
"""Scores (rows times keys) from which MultiHeadAttention, which never writes them all, is faster than Attention."""
_HALF = "kept as a function: the kernels for float32 only are used, and its body computes in float32"


def attention(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """Attention-23 or MultiHeadAttention, on (B, N, H D) where the heads were only split for it."""
    if view.dtype(value) != "float32":
        return Left(_HALF)
    q, k, v, *rest = operands(view, value)
    mask = rest[0] if rest else None
    shapes = [view.shape(str(t)) for t in (q, k, v)]
    if any(s is None for s in shapes) or not all(isinstance(s[1], int) for s in shapes if s is not None):
        return Left("kept as a function: the number of heads is not static")
    apart = [heads_last(view, str(t)) for t in (q, k, v)]
    split = all(a is not None for a in apart)
    plain = mask is None and not attributes(view, value)["causal"] and (shapes[0] or ())[1] == (shapes[1] or ())[1]
    scores = _scores(shapes)
    if split and plain and (view.opset < 23 or scores >= FLASH_FROM):
        return _merged_heads(view, value, [str(a) for a in apart], "MultiHeadAttention")
    if view.opset < 23:
        return Left("kept as a function: before opset 23 there is no kernel for it with a mask or from separate heads")
    if mask is not None:
        axis = 1 if split else 2
        read = [merged(view, str(a), at=value) for a in apart[:2]] if split else [str(q), str(k)]
        whole = _whole_mask(view, mask, shapes, [(t, axis) for t in read], value)
        if isinstance(whole, Left):
            return whole
        mask = whole
    if split:
        return _merged_heads(view, value, [str(a) for a in apart], "Attention", mask)
    attrs = _attention_attributes(view, value)
    return Lowered(value, view.node_at("Attention", [q, k, v, mask], attrs, at=value))


def _scores(shapes: list[Any]) -> int:
    rows, keys = shapes[0][2], shapes[1][2]
    return rows * keys if isinstance(rows, int) and isinstance(keys, int) else 0


def _whole_mask(view: OnnxView, mask: str, shapes: list[Any], sources: list[tuple[str, int]], value: str) -> str | Left:
    """The mask with four axes, expanded to rows and keys: the kernel broadcasts over batch and heads only.

    ``sources``: a tensor and the axis of it that tells the number of rows, and one that tells that of keys.
    """
    shape = view.shape(mask)
    if shape is None:
        return Left("kept as a function: the mask's shape is unknown")
    shape = (1,) * (4 - len(shape)) + shape
    wanted = (shapes[0][2], shapes[1][2])
    if any(got not in (1, want) for got, want in zip(shape[2:], wanted, strict=True)):
        return Left(f"kept as a function: a mask of shape {shape} is not known to fit {wanted} rows and keys")
    if (missing := 4 - len(view.shape(mask) or ())) > 0:
        mask = view.emit("unsqueeze", [mask], {"axes": tuple(range(missing))}, at=value)
    if shape[2:] == wanted:
        return mask
    sizes: list[str | None] = [view.emit_constant(np.asarray([1, 1], dtype=np.int64), at=value)]
    sizes += [_size(view, t, axis, n, value) for (t, axis), n in zip(sources, wanted, strict=True)]
    target = view.node_at("Concat", sizes, {"axis": 0}, at=value)
    if (content := view.constant(target)) is not None:
        target = view.emit_constant(content, at=value)
    return view.node_at("Expand", [mask, target], {}, at=value)


def _size(view: OnnxView, operand: str, axis: int, size: Any, value: str) -> str:
    if isinstance(size, int):
        return view.emit_constant(np.asarray([size], dtype=np.int64), at=value)
    index = view.emit_constant(np.asarray([axis], dtype=np.int64), at=value)
    return view.node_at("Gather", [view.node_at("Shape", [operand], {}, at=value), index], {}, at=value)


def _attention_attributes(view: OnnxView, value: str) -> dict[str, Any]:
    attrs = attributes(view, value)
    return {"scale": float(attrs["scale"]), "is_causal": int(attrs["causal"])}


def _merged_heads(view: OnnxView, value: str, apart: list[str], op: str, mask: str | None = None) -> Lowered:
    q, k, v = (merged(view, a, at=value) for a in apart)
    shape, keys = view.shape(value), view.shape(apart[1])
    assert shape is not None
    assert keys is not None
    if op == "Attention":
        attrs = {**_attention_attributes(view, value), "q_num_heads": shape[1], "kv_num_heads": keys[2]}
        result = view.node_at(op, [q, k, v, mask], attrs, at=value)
    else:
        attrs = {"scale": float(attributes(view, value)["scale"]), "num_heads": shape[1]}
        result = view.node_at(op, [q, k, v], attrs, at=value, domain="com.microsoft")
    return _behind(view, value, result, int(shape[1]))


def _behind(view: OnnxView, value: str, result: str, heads: int) -> Lowered:
    """Take the transpose and the reshape behind (B, H, N, D) along, where (B, N, H D) is all that is wanted of it."""
    user = only_user(view, value)
    op = view.op(user) if user is not None else None
    if user is None or op is None or op.name != "transpose" or op.attrs["perm"] != (0, 2, 1, 3):
        apart = view.emit("reshape", [result], {"shape": (0, 0, heads, -1)}, at=value)
        return Lowered(value, view.emit("transpose", [apart], {"perm": (0, 2, 1, 3)}, at=value))
    last = only_user(view, user)
    op, shape, before = (view.op(last), view.shape(last), view.shape(user)) if last is not None else (None, None, None)
    if last is not None and op is not None and op.name == "reshape" and shape is not None and before is not None:
        width = before[3]
        if len(shape) == 3 and shape[:2] == before[:2] and isinstance(width, int) and shape[2] == heads * width:
            return Lowered(last, result)
    return Lowered(user, view.emit("reshape", [result], {"shape": (0, 0, heads, -1)}, at=value))


def group_norm_act(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """Reshape, InstanceNormalization, Reshape, the affine as one BatchNormalization, the activation as one node."""
    if view.dtype(value) != "float32":
        return Left(_HALF)
    x, *rest = operands(view, value)
    shape, attrs = view.shape(str(x)), attributes(view, value)
    vectors = [*rest, None, None, None, None][:4]
    if shape is None or not isinstance(shape[1], int) or None in vectors[:2] or any(v is not None for v in vectors[2:]):
        return Lowered(value, inline(view, value, native=False))
    groups, channels = int(attrs["groups"]), shape[1]
    grouped = view.emit("reshape", [x], {"shape": (0, groups, -1)}, at=value)
    ones, zeros = (view.emit_constant(f(groups, dtype=np.float32), at=value) for f in (np.ones, np.zeros))
    y = view.node_at("InstanceNormalization", [grouped, ones, zeros], {"epsilon": float(attrs["eps"])}, at=value)
    if sum(not isinstance(d, int) for d in shape[1:]) == 0:
        y = view.emit("reshape", [y], {"shape": (-1, *shape[1:])}, at=value)
    else:
        y = view.node_at("Reshape", [y, view.node_at("Shape", [x], {}, at=value)], {}, at=value)
    mean, variance = (view.emit_constant(f(channels, dtype=np.float32), at=value) for f in (np.zeros, np.ones))
    operands_ = [y, vectors[0], vectors[1], mean, variance]
    y = view.node_at("BatchNormalization", operands_, {"epsilon": 0.0}, at=value)
    return Lowered(value, _activation(view, y, str(attrs["act"]), value))


def _activation(view: OnnxView, y: str, act: str, at: str) -> str:
    if act in ("silu", "quick_gelu"):
        alpha = 1.0 if act == "silu" else 1.702
        return view.node_at("QuickGelu", [y], {"alpha": alpha}, at=at, domain="com.microsoft")
    if act in ("gelu", "gelu_tanh"):
        return _gelu(view, y, "tanh" if act == "gelu_tanh" else "none", at)
    return y


def _gelu(view: OnnxView, x: str, approximate: str, at: str) -> str:
    if view.opset >= 20:
        return view.node_at("Gelu", [x], {"approximate": approximate}, at=at)
    op = "FastGelu" if approximate == "tanh" else "Gelu"
    return view.node_at(op, [x], {}, at=at, domain="com.microsoft")


def gelu(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """One kernel at any opset."""
    if view.dtype(value) != "float32":
        return Left(_HALF)
    (x,) = operands(view, value)
    return Lowered(value, _gelu(view, str(x), str(attributes(view, value)["approximate"]), value))


def geglu(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """Split, one GELU node, Mul."""
    if view.dtype(value) != "float32":
        return Left(_HALF)
    attrs, (x,) = attributes(view, value), operands(view, value)
    axis = len(view.shape(str(x)) or ()) - 1
    extra = {"num_outputs": 2} if view.opset >= 18 else {}
    first = view.node_at("Split", [x], {"axis": axis, **extra}, at=value, outputs=2)
    second = str(view.node(first).outputs[1].name)
    content, gate = (second, first) if attrs["gate_first"] else (first, second)
    return Lowered(
        value, view.emit("mul", [content, _gelu(view, gate, str(attrs["approximate"]), value)], {}, at=value)
    )


def upsample_conv2d(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """Stays: its body is the fastest spelling, and needs no larger weights in the file."""
    return Left("kept as a function: its four convolutions are the fastest spelling")


CPU = {
    "hasten.Attention": attention,
    "hasten.GroupNormAct": group_norm_act,
    "hasten.Gelu": gelu,
    "hasten.Geglu": geglu,
    "hasten.UpsampleConv2d": upsample_conv2d,
    "ReduceMean": lower_sums.mean_of_absolutes,
    "Add": lower_sums.of_slices,
    **contrib.WITHOUT_CPU_KERNEL,
}
"""Operator -> how it is written for ONNX Runtime on a CPU."""


def attention_on_cuda(view: OnnxView, value: str, context: Context) -> Lowered | Left:
    """MultiHeadAttention, which has flash kernels, where there is no mask and the heads were only split for it."""
    q, k, v, *rest = operands(view, value)
    apart = [heads_last(view, str(t)) for t in (q, k, v)]
    shapes = [view.shape(str(t)) for t in (q, k)]
    same = shapes[0] is not None and shapes[1] is not None and shapes[0][1] == shapes[1][1]
    if any(rest) or attributes(view, value)["causal"] or None in apart or not same:
        return Left("kept as a function: MultiHeadAttention takes merged heads and no causal mask of this kind")
    if not isinstance((shapes[0] or ())[1], int):
        return Left("kept as a function: the number of heads is not static")
    return _merged_heads(view, value, [str(a) for a in apart], "MultiHeadAttention")


CUDA = {"hasten.Attention": attention_on_cuda}
"""Operator -> how it is written for ONNX Runtime on a GPU: what has a kernel there by its list, not measured."""
