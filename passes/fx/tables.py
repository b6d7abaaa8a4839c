"""Which FX call is which neutral operator: one table for Dynamo's functions and methods and for ATen's operators.

Names are shared by function, method and ATen operator (``softmax``); ``F.`` marks a function of
``torch.nn.functional`` whose arguments are in another order. ``arguments`` are the positional names, so that a row
reads keywords as well. `hasten.passes.fx.write` is the other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from hasten.passes.fx.call import Call, Row, TupleRow
from hasten.passes.fx.own import OWN
from hasten.passes.pattern import OpView


def _operands(call: Call, *names: str) -> tuple[Any, ...] | None:
    values = tuple(call.value(n) for n in names)
    return None if any(v is None for v in values) else values


def _unary(name: str) -> Row:
    def read(call: Call) -> OpView[Any] | None:
        operands = _operands(call, "self")
        return OpView(name, operands) if operands else None

    return Row(("self",), read)


def _binary(name: str, *, swapped: bool = False) -> Row:
    def read(call: Call) -> OpView[Any] | None:
        operands = _operands(call, "self", "other")
        if operands is None or call.raw("alpha", 1) != 1 or call.raw("rounding_mode") is not None:
            return None
        return OpView(name, operands[::-1] if swapped else operands)

    return Row(("self", "other"), read)


def _identity(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self")
    return OpView("identity", operands) if operands else None


def _dropout(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self")
    active = call.raw("p", 0.5) != 0 and call.raw("training", True)
    return None if active or operands is None else OpView("identity", operands)


def _cast(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self")
    if operands is None:
        return None
    before, after = call.view.dtype(operands[0]), call.view.dtype(call.node)
    return OpView("identity", operands) if before == after else OpView("cast", operands, {"to": after})


def _gelu(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self")
    return OpView("gelu", operands, {"approximate": call.raw("approximate", "none")}) if operands else None


def _softmax(call: Call) -> OpView[Any] | None:
    operands, axis = _operands(call, "self"), call.axis(call.raw("dim"))
    return OpView("softmax", operands, {"axis": axis}) if operands and axis is not None else None


def _baddbmm(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self", "batch1", "batch2")
    return (
        OpView("baddbmm", operands, {"beta": call.raw("beta", 1), "alpha": call.raw("alpha", 1)}) if operands else None
    )


def _einsum(call: Call) -> OpView[Any] | None:
    equation = call.raw("equation")
    listed = call.raw("operands")
    operands = listed if isinstance(listed, (tuple, list)) else call.node.args[1:]
    if not isinstance(equation, str) or not all(isinstance(o, fx.Node) for o in operands):
        return None
    return OpView("einsum", tuple(operands), {"equation": equation})


def _sdpa(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "query", "key", "value")
    if operands is None or call.raw("dropout_p", 0.0) != 0.0:
        return None
    attrs = {
        "scale": call.raw("scale"),
        "causal": bool(call.raw("is_causal", False)),
        "gqa": bool(call.raw("enable_gqa", False)),
    }
    return OpView("sdpa", (*operands, call.value("attn_mask")), attrs)


def _numbers(values: Iterable[Any]) -> bool:
    """Whether all are numbers: Dynamo makes those that it found in a module inputs of the graph, at first."""
    return all(isinstance(v, (int, float)) for v in values)


def _group_norm(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self")
    if operands is None:
        return None
    attrs = {"groups": call.raw("num_groups"), "eps": call.raw("eps", 1e-5)}
    if not _numbers(attrs.values()):
        return None
    return OpView("group_norm", (*operands, call.value("weight"), call.value("bias")), attrs)


def _reduction(name: str, default_axes: bool = True) -> Row:
    def read(call: Call) -> OpView[Any] | None:
        operands, shape = _operands(call, "self"), call.shape("self")
        axes = call.raw("dim")
        if operands is None or shape is None or call.raw("dtype") is not None or (axes is None and not default_axes):
            return None
        listed = range(len(shape)) if axes is None else axes if isinstance(axes, (tuple, list)) else (axes,)
        if not all(isinstance(a, int) for a in listed) or not isinstance(call.view.op_result(call.node), torch.Tensor):
            return None
        attrs: dict[str, Any] = {
            "axes": tuple(sorted(a % len(shape) for a in listed)),
            "keepdims": bool(call.raw("keepdim", False)),
        }
        if name == "var":
            correction = call.raw("correction", call.node.kwargs.get("unbiased", 1))
            attrs["correction"] = 1 if correction is None else correction
        return OpView(name, operands, attrs)

    return Row(("self", "dim", "keepdim") if name != "var" else ("self", "dim", "correction", "keepdim"), read)


def _reshape(call: Call) -> OpView[Any] | None:
    operands, before = _operands(call, "self"), call.shape("self")
    after = call.view.shape(call.node)
    if operands is None or before is None or after is None:
        return None
    return OpView("identity" if before == after else "reshape", operands)


def _expand(call: Call) -> OpView[Any] | None:
    operands, before = _operands(call, "self"), call.shape("self")
    if operands is None or before is None:
        return None
    return OpView("identity" if before == call.view.shape(call.node) else "expand", operands)


def _transpose(call: Call) -> OpView[Any] | None:
    operands, shape = _operands(call, "self"), call.shape("self")
    if operands is None or shape is None:
        return None
    perm = list(range(len(shape)))
    if call.name in ("t", "T", "mT"):
        a, b = (len(shape) - 2, len(shape) - 1)
        if call.name != "mT" and len(shape) != 2:
            return None
        perm[a], perm[b] = perm[b], perm[a]
    elif call.name == "permute":
        dims = call.rest("dims")
        if len(dims) != len(shape) or not all(isinstance(d, int) for d in dims):
            return None
        perm = [d % len(shape) for d in dims]
    else:
        first, second = call.axis(call.raw("dim0")), call.axis(call.raw("dim1"))
        if first is None or second is None:
            return None
        perm[first], perm[second] = perm[second], perm[first]
    return OpView("transpose", operands, {"perm": tuple(perm)})


def _repeat(call: Call) -> OpView[Any] | None:
    operands, axis = _operands(call, "self"), call.axis(call.raw("dim"))
    times = call.raw("repeats")
    if operands is None or axis is None or not isinstance(times, int):
        return None
    return OpView("repeat", operands, {"axis": axis, "times": times})


def _getitem(call: Call) -> OpView[Any] | None:
    """A tuple's item speaks for the node that made the tuple; of a tensor, half of one axis is a part."""
    source, index = call.raw("self"), call.raw("other")
    if isinstance(index, tuple):
        return _indexed(call, index)
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    from hasten.passes.fx.view import call_name

    name = call_name(source)
    row = TUPLES.get(name)
    return row.read(Call(call.view, source, name, row.arguments), index) if row else None


def _indexed(call: Call, index: tuple[Any, ...]) -> OpView[Any] | None:
    """``x[..., a:b]`` and ``x[:, a:b]``: one slice among whole axes."""
    operands, shape = _operands(call, "self"), call.shape("self")
    if operands is None or shape is None or sum(i is Ellipsis for i in index) > 1:
        return None
    place = index.index(Ellipsis) if Ellipsis in index else len(index)
    whole = slice(None)
    axes = (*index[:place], *[whole] * (len(shape) - len(index) + (Ellipsis in index)), *index[place + 1 :])
    cut = [axis for axis, i in enumerate(axes) if not isinstance(i, slice) or i != whole]
    if len(axes) != len(shape) or len(cut) != 1 or not isinstance(axes[cut[0]], slice):
        return None
    return _half(operands, shape, cut[0], axes[cut[0]])


def _half(operands: tuple[Any, ...], shape: tuple[Any, ...], axis: int, cut: slice) -> OpView[Any] | None:
    """Half of an axis, the way GEGLU gates are sliced; all of it is the operand itself."""
    size, start, end = shape[axis], cut.start or 0, cut.stop
    if cut.step not in (None, 1) or not all(isinstance(n, int) for n in (size, start, 0 if end is None else end)):
        return None
    start, end, _ = slice(start, end).indices(size)
    if (start, end) == (0, size):
        return OpView("identity", operands)
    if size % 2 == 0 and (start, end) in ((0, size // 2), (size // 2, size)):
        return OpView("part", operands, {"axis": axis, "index": int(start > 0), "parts": 2})
    return None


def _part(call: Call, index: int) -> OpView[Any] | None:
    operands, axis, shape = _operands(call, "self"), call.axis(call.raw("dim", 0)), call.shape("self")
    if operands is None or axis is None or shape is None or not isinstance(shape[axis], int):
        return None
    pieces = call.view.op_result(call.node)
    if not isinstance(pieces, (tuple, list)) or len({p.shape[axis] for p in pieces}) != 1:
        return None
    return OpView("part", operands, {"axis": axis, "index": index % len(pieces), "parts": len(pieces)})


def _native_group_norm(call: Call, index: int) -> OpView[Any] | None:
    operands = _operands(call, "self")
    if index != 0 or operands is None:
        return None
    attrs = {"groups": call.raw("group"), "eps": call.raw("eps")}
    if not _numbers(attrs.values()):
        return None
    return OpView("group_norm", (*operands, call.value("weight"), call.value("bias")), attrs)


def _native_sdpa(call: Call, index: int) -> OpView[Any] | None:
    if index != 0 or call.raw("dropout_p", 0.0) != 0.0:
        return None
    return _sdpa(call)


def _var_mean(call: Call, index: int) -> OpView[Any] | None:
    operands, shape, axes = _operands(call, "self"), call.shape("self"), call.raw("dim")
    if operands is None or shape is None or not isinstance(axes, (tuple, list)):
        return None
    attrs: dict[str, Any] = {
        "axes": tuple(sorted(a % len(shape) for a in axes)),
        "keepdims": bool(call.raw("keepdim", False)),
    }
    if index == 1:
        return OpView("mean", operands, attrs)
    correction = call.raw("correction", call.node.kwargs.get("unbiased", 1))
    return OpView("var", operands, {**attrs, "correction": 1 if correction is None else correction})


def _slice(call: Call) -> OpView[Any] | None:
    operands, axis, shape = _operands(call, "self"), call.axis(call.raw("dim", 0)), call.shape("self")
    if operands is None or axis is None or shape is None:
        return None
    return _half(operands, shape, axis, slice(call.raw("start"), call.raw("end"), call.raw("step", 1)))


def _where(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "condition", "self", "other")
    return OpView("where", operands) if operands else None


def _masked_fill(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self", "mask", "value")
    return OpView("masked_fill", operands) if operands else None


def _pair(value: Any, rank: int) -> tuple[int, ...] | None:
    if isinstance(value, int):
        return (value,) * rank
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        return tuple(value) if len(value) == rank else tuple(value) * rank if len(value) == 1 else None
    return None


def _convolution(call: Call) -> OpView[Any] | None:
    operands, shape = _operands(call, "self", "weight"), call.shape("weight")
    if operands is None or shape is None or call.raw("transposed", False):
        return None
    rank, padding = len(shape) - 2, call.raw("padding", 0)
    stride, dilation = _pair(call.raw("stride", 1), rank), _pair(call.raw("dilation", 1), rank)
    if stride is None or dilation is None:
        return None
    if padding == "valid":
        pads: tuple[int, ...] | None = (0,) * rank
    elif padding == "same":
        if not all(isinstance(k, int) and k % 2 for k in shape[2:]):
            return None
        pads = tuple(d * (k - 1) // 2 for d, k in zip(dilation, shape[2:], strict=True))
    else:
        pads = _pair(padding, rank)
    if pads is None:
        return None
    attrs = {"stride": stride, "padding": pads * 2, "dilation": dilation, "groups": call.raw("groups", 1)}
    return OpView(f"conv{rank}d", (*operands, call.value("bias")), attrs)


def _linear(call: Call) -> OpView[Any] | None:
    operands = _operands(call, "self", "weight")
    return OpView("linear", (*operands, call.value("bias")), {"out_axis": 0}) if operands else None


def _addmm(call: Call) -> OpView[Any] | None:
    """A linear layer after decomposition: a bias, and the product with a transposed matrix."""
    operands, bias = _operands(call, "mat1", "mat2", "self"), call.shape("self")
    matrix = None if operands is None else call.view.op(operands[1])
    if operands is None or matrix is None or matrix.name != "transpose" or bias is None or len(bias) != 1:
        return None
    if call.raw("alpha", 1) != 1 or call.raw("beta", 1) != 1:
        return None
    return OpView("linear", (operands[0], matrix.inputs[0], operands[2]), {"out_axis": 0})


def _batch_norm(call: Call, index: int = 0) -> OpView[Any] | None:
    operands, attrs = _operands(call, "self"), {"eps": call.raw("eps", 1e-5), "training": call.raw("training", False)}
    if operands is None or index != 0 or not _numbers(attrs.values()):
        return None
    vectors = (call.value(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return OpView("batch_norm", (*operands, *vectors), attrs)


def _upsample(call: Call) -> OpView[Any] | None:
    """Nearest upsampling by whole factors, told from the shapes before and after."""
    operands, before, after = _operands(call, "self"), call.view.sizes(call.raw("self")), call.view.sizes(call.node)
    if (
        operands is None
        or before is None
        or after is None
        or call.raw("mode", "nearest") not in ("nearest", "nearest-exact")
    ):
        return None
    scale = []
    for small, large in zip(before[2:], after[2:], strict=True):
        factor = next((f for f in (1, 2, 3, 4, 8) if _surely_equal(large, small * f)), None)
        if factor is None:
            return None
        scale.append(factor)
    return OpView("upsample_nearest", operands, {"scale": tuple(scale)})


def _surely_equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(a == b))


def _pad(call: Call) -> OpView[Any] | None:
    operands, pads, mode = _operands(call, "self"), call.raw("pad"), call.raw("mode", "constant")
    if operands is None or not isinstance(pads, (tuple, list)):
        return None
    if mode != "constant":
        return OpView(f"pad_{mode}", operands, {"pads": tuple(pads)})
    value = call.raw("value")
    return OpView("pad", operands, {"pads": tuple(pads), "value": 0.0 if value is None else value})


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_BATCH_NORM = ("self", "weight", "bias", "running_mean", "running_var")
_CONV = ("self", "weight", "bias", "stride", "padding", "dilation")

READ: dict[str, Row] = {
    "add": _binary("add"), "sub": _binary("sub"), "mul": _binary("mul"), "div": _binary("div"), "pow": _binary("pow"),
    "truediv": _binary("div"), "true_divide": _binary("div"), "divide": _binary("div"), "multiply": _binary("mul"),
    "rsub": _binary("sub", swapped=True), "eq": _binary("eq"), "ne": _binary("ne"),
    "neg": _unary("neg"), "exp": _unary("exp"), "erf": _unary("erf"), "tanh": _unary("tanh"), "sqrt": _unary("sqrt"),
    "rsqrt": _unary("rsqrt"), "sigmoid": _unary("sigmoid"), "silu": _unary("silu"),
    "logical_not": _unary("logical_not"), "bitwise_not": _unary("logical_not"), "invert": _unary("logical_not"),
    "reciprocal": _unary("reciprocal"), "isnan": _unary("isnan"), "square": _unary("square"),
    "full_like": _unary("filled"), "zeros_like": _unary("filled"),
    "gelu": Row(("self",), _gelu),
    "softmax": Row(("self", "dim", "dtype"), _softmax),
    "F.softmax": Row(("self", "dim", "_stacklevel", "dtype"), _softmax),
    "_softmax": Row(("self", "dim", "half_to_float"), _softmax),
    "_safe_softmax": Row(("self", "dim", "dtype"), _softmax),
    "matmul": _binary("matmul"), "bmm": Row(("self", "mat2"), lambda c: _matmul(c, "mat2")),
    "mm": Row(("self", "mat2"), lambda c: _matmul(c, "mat2")), "__matmul__": _binary("matmul"),
    "baddbmm": Row(("self", "batch1", "batch2"), _baddbmm),
    "einsum": Row(("equation", "operands"), _einsum),
    "scaled_dot_product_attention": Row(_SDPA, _sdpa),
    "group_norm": Row(("self", "num_groups", "weight", "bias", "eps"), _group_norm),
    "mean": _reduction("mean"), "sum": _reduction("sum"), "amax": _reduction("max"), "var": _reduction("var"),
    "any": _reduction("any"),
    "view": Row(("self",), _reshape), "reshape": Row(("self",), _reshape), "_unsafe_view": Row(("self",), _reshape),
    "flatten": Row(("self",), _reshape), "unflatten": Row(("self",), _reshape), "unsqueeze": Row(("self",), _reshape),
    "squeeze": Row(("self",), _reshape), "_reshape_alias": Row(("self",), _reshape),
    "expand": Row(("self",), _expand), "expand_as": Row(("self",), _expand),
    "transpose": Row(("self", "dim0", "dim1"), _transpose), "swapaxes": Row(("self", "dim0", "dim1"), _transpose),
    "permute": Row(("self", "dims"), _transpose), "t": Row(("self",), _transpose),
    "repeat_interleave": Row(("self", "repeats", "dim"), _repeat),
    "slice": Row(("self", "dim", "start", "end", "step"), _slice),
    "getitem": Row(("self", "other"), _getitem),
    "where": Row(("condition", "self", "other"), _where),
    "masked_fill": Row(("self", "mask", "value"), _masked_fill),
    **{f"conv{rank}d": Row((*_CONV, "groups"), _convolution) for rank in (1, 2, 3)},
    "convolution": Row((*_CONV, "transposed", "output_padding", "groups"), _convolution),
    "linear": Row(("self", "weight", "bias"), _linear), "addmm": Row(("self", "mat1", "mat2"), _addmm),
    "batch_norm": Row((*_BATCH_NORM, "training", "momentum", "eps"), _batch_norm),
    "F.batch_norm": Row(
        ("self", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), _batch_norm
    ),
    "interpolate": Row(("self", "size", "scale_factor", "mode"), _upsample),
    "upsample_nearest2d": Row(("self",), _upsample), "_upsample_nearest_exact2d": Row(("self",), _upsample),
    "pad": Row(("self", "pad", "mode", "value"), _pad), "constant_pad_nd": Row(("self", "pad", "value"), _pad),
    "dropout": Row(("self", "p", "training"), _dropout), "dropout2d": Row(("self", "p", "training"), _dropout),
    "native_dropout": Row(("self", "p", "training"), _dropout),
    **OWN,
    **{n: Row(("self",), _identity) for n in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "dropout_")},
    **{n: Row(("self",), _cast) for n in ("to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy")},
}  # fmt: skip

TUPLES: dict[str, TupleRow] = {
    "chunk": TupleRow(("self", "chunks", "dim"), _part),
    "split": TupleRow(("self", "split_size", "dim"), _part),
    "split_with_sizes": TupleRow(("self", "split_sizes", "dim"), _part),
    "tensor_split": TupleRow(("self", "indices_or_sections", "dim"), _part),
    "native_group_norm": TupleRow(("self", "weight", "bias", "N", "C", "HxW", "group", "eps"), _native_group_norm),
    "_native_batch_norm_legit_no_training": TupleRow((*_BATCH_NORM, "momentum", "eps"), _batch_norm),
    "native_batch_norm": TupleRow((*_BATCH_NORM, "training", "momentum", "eps"), _batch_norm),
    "_native_batch_norm_legit": TupleRow((*_BATCH_NORM, "training", "momentum", "eps"), _batch_norm),
    "var_mean": TupleRow(("self", "dim", "correction", "keepdim"), _var_mean),
    "_scaled_dot_product_flash_attention_for_cpu": TupleRow(
        ("query", "key", "value", "dropout_p", "is_causal"), _native_sdpa
    ),
}


def _matmul(call: Call, second: str) -> OpView[Any] | None:
    operands = _operands(call, "self", second)
    return OpView("matmul", operands) if operands else None
