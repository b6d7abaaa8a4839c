"""Constants behind a convolution or a linear layer -> its weight and bias; ``x * 1``, ``x / 1``, ``x ± 0`` -> ``x``.

``s (W x + b) + t = (s W) x + (s b + t)`` with one ``s`` and ``t`` a channel. A BatchNorm on its running statistics is
``s = weight / sqrt(var + eps)``, ``t = bias - mean s`` (Ioffe & Szegedy, 1502.03167, algorithm 2). Any row of scales,
shifts and BatchNorms is taken at once, computed in float64 and rounded once. Met as operators, ``F.batch_norm``,
``addmm`` and ``Gemm``; ``/ 1.0`` is diffusers' ``output_scale_factor``.

Left alone: weights and statistics that are inputs of the graph, since folding them would cost work at every call;
half-precision weights, unless no number has to be rounded again; training BatchNorms; a result that somebody else
reads; transposed convolutions; a linear layer that is reshaped before its constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.passes.pattern import COMMUTATIVE, GraphView, Match, OpView, V, enter, scalar, through
from hasten.passes.rule import Rule

_LAYERS = ("conv1d", "conv2d", "conv3d", "linear", "matmul")
_NEUTRAL = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0}
# x + 0.0 makes 0.0 of -0.0 and changes no other number. Which zero a sum ends in hangs on the order of its terms, which
# no rewrite keeps; Inductor (remove_no_ops) and ONNX Runtime (NoopElimination) drop such sums themselves.
_SLOTS = {n: ((1, 0), (0, 1)) if n in COMMUTATIVE else ((1, 0),) for n in (*_NEUTRAL, "batch_norm")}
"""Where the constant may stand, and the other operand."""
_OUTSIDE = "inputs of the graph: folding them would cost work at every call"


def _known(view: GraphView[V], value: V | None) -> npt.NDArray[Any] | None:
    """The content of what the graph itself holds or computes from constants."""
    held = None if value is None else view.weights(value)
    return view.constant(value) if held is None and value is not None else held


@dataclass(frozen=True)
class _Neutral:
    """Matches an operator that returns its operand as it is, in type and shape as well."""

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        op = None if value is None else view.op(value)
        if value is None or op is None or op.name not in _NEUTRAL:
            return "not a sum or a product"
        for slot, other in _SLOTS[op.name]:
            x = op.inputs[other]
            if x is None or scalar(view, op.inputs[slot], filled=True) != _NEUTRAL[op.name]:
                continue
            kind = (view.dtype(x), view.shape(x))
            if None in kind or kind != (view.dtype(value), view.shape(value)):
                return f"{view.where(value)} changes the type or the shape"
            found.values.update(x=x, root=value)
            found.tags["kind"] = "no-op"
            found.edges[value, other] = x
            found.ops.append("no-op")
            return None
        return f"{view.where(value)} is not a neutral {op.name}"


@dataclass(frozen=True)
class _Constants:
    """Matches a layer with constants behind it; binds its operands, and the constant steps, the last one first."""

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        found.values["root"], steps = value, list[tuple[OpView[V], int]]()
        while value is not None and (op := view.op(value)) is not None and op.name not in _LAYERS:
            slots = _SLOTS.get(op.name, ())
            known = (s for s in slots if op.name == "batch_norm" or _known(view, op.inputs[s[0]]) is not None)
            slot, other = next(known, (0, 0))
            if slot == other:
                return f"{view.where(value)} is {view.describe(value)}, not a constant step"
            steps.append((op, slot))
            found.edges.update({(value, n): v for n, v in enumerate(op.inputs) if v is not None})
            inner = op.inputs[other]
            value = None if inner is None else enter(view, inner, found)
        if value is None or op is None or not steps:
            return "no constant behind a layer"
        names = {step.name for step, _ in steps}
        weight, axis = op.inputs[1], op.attrs.get("out_axis", 0)
        if op.name == "matmul":
            weight, axis = _matrix(view, weight)
            if weight is None or (len(steps) == 1 and names <= {"add", "sub"}):
                return f"{view.where(value)} is no linear layer, or has nothing but its bias behind it"
        found.edges.update({(value, n): v for n, v in enumerate(op.inputs) if v is not None})
        bias = op.inputs[2] if len(op.inputs) > 2 else None
        found.values.update(x=op.inputs[0], weight=weight, bias=bias, layer=value)
        found.attrs.update(steps=steps, op=op, axis=axis)
        kinds = (("batch-norm", {"batch_norm"}), ("scale", {"mul", "div"}), ("shift", names))
        found.tags["kind"] = next(kind for kind, some in kinds if some & names)
        found.ops.append(op.name)
        return None


def _matrix(view: GraphView[Any], value: Any) -> tuple[Any, int]:
    """The matrix of weights that a product multiplies by, and which of its axes is the result's; or None."""
    below, axis = view.op(value := through(view, value)), 1
    if below is not None and below.name == "transpose" and below.inputs[0] is not None:
        value, axis = through(view, below.inputs[0]), 0
    held = view.weights(value)
    return (value if held is not None and held.ndim == 2 else None), axis


def _vector(content: npt.NDArray[Any], rank: int, axis: int, size: int) -> npt.NDArray[Any] | None:
    """A constant as one number a channel, in float64; None where it differs along another axis or adds one."""
    shape = (1,) * (rank - content.ndim) + content.shape
    if len(shape) != rank or any(d != 1 for a, d in enumerate(shape) if a != axis) or shape[axis] not in (1, size):
        return None
    return np.broadcast_to(content.astype(np.float64).reshape(-1), (size,))


def _affine(view: GraphView[Any], found: Match[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | str:
    """Scale and shift of all steps, or why there are none."""
    shape, name, rank = view.shape(found["layer"]), found.attrs["op"].name, len(view.shape(found["weight"]) or ())
    axis = 1 if (conv := name.startswith("conv")) else len(shape or ()) - 1
    if not shape or rank != (len(shape) if conv else 2) or not isinstance(size := shape[axis], int):
        return f"the {name}'s result has shape {shape}: which axis its channels are cannot be told"
    scale, shift = np.ones(size), np.zeros(size)
    for op, slot in reversed(found.attrs["steps"]):
        if op.name != "batch_norm":
            content = _known(view, op.inputs[slot])
            assert content is not None
            if (c := _vector(content, len(shape), axis, size)) is None:
                return f"the constant has shape {content.shape}, not one number a channel of {shape}"
            if op.name in ("add", "sub"):
                shift = shift + c if op.name == "add" else shift - c
            else:
                scale, shift = (scale * c, shift * c) if op.name == "mul" else (scale / c, shift / c)
            continue
        if op.attrs["training"]:
            return "the BatchNorm is in training mode: its statistics are those of the batch"
        if axis != 1:
            return f"the BatchNorm is of axis 1, the layer's channels are axis {axis}"
        vectors = [_known(view, v) for v in op.inputs[1:]]
        if any(c is None and v is not None for c, v in zip(vectors, op.inputs[1:], strict=True)):
            return f"the BatchNorm's weights or statistics are {_OUTSIDE}"
        absent = (1.0, 0.0, 0.0, 1.0)
        weight, bias, mean, var = (np.float64(a if c is None else c) for c, a in zip(vectors, absent, strict=True))
        factor = weight / np.sqrt(var + op.attrs["eps"])
        scale, shift = scale * factor, (shift - mean) * factor + bias
    return scale, shift


@np.errstate(all="ignore")
def _guard(view: GraphView[Any], found: Match[Any]) -> str | None:
    """Bind the folded weight and bias as attribute ``folded``, or say why there are none."""
    if found.tags["kind"] == "no-op":
        return view.sharing(found["root"], found["x"])
    affine = _affine(view, found)
    if isinstance(affine, str):
        return affine
    (scale, shift), dtype = affine, view.dtype(found["weight"])
    for name, what in (("x", "input"), ("bias", "bias"), ("layer", "layer's result"), ("root", "result")):
        if (value := found.values[name]) is not None and view.dtype(value) != dtype:
            return f"the weights are {dtype}, the {what} is {view.dtype(value)}"
    if dtype not in ("float16", "float32", "float64"):
        return f"the weights are {dtype}: folding would round them a second time"
    weight = bias = None
    if (scale != 1).any():
        if (weight := view.weights(found["weight"])) is None:
            return f"the weights are {_OUTSIDE}"
        across = [-1 if a == found.attrs["axis"] else 1 for a in range(weight.ndim)]
        weight = weight.astype(np.float64) * scale.reshape(across)
    if found.values["bias"] is not None:
        if (bias := _known(view, found["bias"])) is None:
            return f"the bias is one of the {_OUTSIDE}"
        bias = bias.astype(np.float64) * scale + shift
    elif shift.any():
        bias = shift
    for wide in (c for c in (weight, bias) if c is not None):
        if not np.isfinite(rounded := wide.astype(dtype)).all():
            return f"a folded number is not finite in {dtype}"
        if dtype == "float16" and not np.array_equal(rounded, wide):
            return f"the weights are {dtype}: folding would round them a second time"
    found.attrs["folded"] = [None if c is None else c.astype(dtype) for c in (weight, bias)]
    return None


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    if found.tags["kind"] == "no-op":
        return found["x"]
    op, x = found.attrs["op"], found["x"]
    weight, bias = (None if c is None else view.emit_constant(c, at=root) for c in found.attrs["folded"])
    if op.name != "matmul":
        return view.emit(op.name, [x, found["weight"] if weight is None else weight, bias], op.attrs, at=root)
    if weight is not None and found.attrs["axis"] == 0:
        weight = view.emit("transpose", [weight], {"perm": (1, 0)}, at=root)
    product = view.emit("matmul", [x, op.inputs[1] if weight is None else weight], {}, at=root)
    return product if bias is None else view.emit("add", [product, bias], {}, at=root)


FOLD_CONV = Rule(
    name="fold-conv",
    spellings=(("no-op", _Neutral()), ("constants", _Constants())),
    guard=_guard,
    replace=_replace,
    anchors=frozenset({"no-op", *_LAYERS}),
    variant=lambda found: found.tags["kind"],
)
