"""Which ATen call stands for a neutral operator that a rule emits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from hasten.passes import ops as _ops  # noqa: F401  (registers torch.ops.hasten)

if TYPE_CHECKING:
    from hasten.passes.fx.view import FxView

aten = torch.ops.aten
Written = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _plain(target: Callable[..., Any], *names: str) -> Callable[[FxView, list[Any], Any], Written]:
    """Operands, then the named attributes, in order."""

    def write(view: FxView, inputs: list[Any], attrs: Any) -> Written:
        return target, (*inputs, *(list(a) if isinstance(a := attrs[n], tuple) else a for n in names)), {}

    return write


def _scalar_or_tensor(name: str) -> Callable[[FxView, list[Any], Any], Written]:
    packet = getattr(aten, name)

    def write(view: FxView, inputs: list[Any], attrs: Any) -> Written:
        scalar = not isinstance(inputs[1], fx.Node)
        return (packet.Scalar if scalar else packet.Tensor), tuple(inputs), {}

    return write


def _write_where(view: FxView, inputs: list[Any], attrs: Any) -> Written:
    overload = aten.where.self if isinstance(inputs[2], fx.Node) else aten.where.ScalarOther
    return overload, tuple(inputs), {}


def _write_cast(view: FxView, inputs: list[Any], attrs: Any) -> Written:
    return aten.to.dtype, (inputs[0], getattr(torch, attrs["to"])), {}


def _write_unsqueeze(view: FxView, inputs: list[Any], attrs: Any) -> Written:
    (axis,) = attrs["axes"]
    return aten.unsqueeze.default, (inputs[0], axis), {}


def _write_gelu(view: FxView, inputs: list[Any], attrs: Any) -> Written:
    return aten.gelu.default, (inputs[0],), {"approximate": attrs["approximate"]}


def _write_conv(rank: int) -> Callable[[FxView, list[Any], Any], Written]:
    def write(view: FxView, inputs: list[Any], attrs: Any) -> Written:
        before, after = attrs["padding"][:rank], attrs["padding"][rank:]
        assert before == after, "FX convolutions pad both sides alike"
        where = [list(attrs["stride"]), list(before), list(attrs["dilation"])]
        return getattr(aten, f"conv{rank}d").default, (*inputs, *where, attrs["groups"]), {}

    return write


_HASTEN = torch.ops.hasten

WRITE: dict[str, Callable[[FxView, list[Any], Any], Written]] = {
    "attention": _plain(_HASTEN.attention.default, "scale", "causal"),
    "flash_attention": _plain(_HASTEN.flash_attention.default, "scale"),
    "group_norm_act": _plain(_HASTEN.group_norm_act.default, "groups", "eps", "act"),
    "geglu": _plain(_HASTEN.geglu.default, "approximate", "gate_first"),
    "upsample_conv2d": _plain(_HASTEN.upsample_conv2d.default),
    "winograd_conv2d": _plain(
        _HASTEN.winograd_conv2d.default, "outputs", "tile", "phases", "padding", "padding_mode", "act_in", "act_out",
        "workspace",
    ),
    "group_norm_affine": _plain(_HASTEN.group_norm_affine.default, "groups", "eps"),
    "apply_affine": _plain(_HASTEN.apply_affine.default, "act"),
    "gelu": _write_gelu,
    "add": _scalar_or_tensor("add"), "sub": _scalar_or_tensor("sub"), "mul": _scalar_or_tensor("mul"),
    "div": _scalar_or_tensor("div"),
    "matmul": _plain(aten.matmul.default), "linear": _plain(aten.linear.default),
    **{f"conv{rank}d": _write_conv(rank) for rank in (1, 2, 3)},
    "where": _write_where, "cast": _write_cast,
    "logical_not": _plain(aten.logical_not.default), "logical_and": _plain(aten.logical_and.default),
    "logical_or": _plain(aten.logical_or.default), "any": _plain(aten.any.dims, "axes", "keepdims"),
    "transpose": _plain(aten.permute.default, "perm"), "reshape": _plain(aten.reshape.default, "shape"),
    "unsqueeze": _write_unsqueeze, "squeeze": _plain(aten.squeeze.dims, "axes"),
}  # fmt: skip

RESULT: dict[Any, Callable[..., torch.Tensor]] = {
    _HASTEN.attention.default: lambda q, k, v, *_: q.new_empty((*q.shape[:-1], v.shape[-1])),
    _HASTEN.group_norm_act.default: lambda x, *_: torch.empty_like(x),
    _HASTEN.geglu.default: lambda x, *_: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    _HASTEN.upsample_conv2d.default: lambda x, w, *_: x.new_empty(
        (x.shape[0], w.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    ),
}
"""Shape and type of a fused operator's result, without tracing what it decomposes into."""
