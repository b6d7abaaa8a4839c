"""``hasten::group_norm_act``: y = act(group_norm(x; weight, bias) * scale + shift), one node in a graph.

x is (B, C, *spatial) with any number of spatial dimensions, groups divides C; weight and bias are (C,); scale and
shift are (B, C) or (B, C, 1, ...) with 1 allowed for B or C; every one of the four may be None. Statistics are taken
in float32 (float64 for float64 input), whatever the types of x and of the parameters; the result has x's type and
memory format. Group normalisation: Wu and He, arXiv 1803.08494. The variance is the biased one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.passes.ops import registry
from hasten.passes.ops.activations import ACTIVATIONS, activation
from hasten.passes.ops.group_norm_act import affine as affine
from hasten.passes.ops.group_norm_act import cpu

SCHEMA = (
    "group_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "int groups, float eps, str act) -> Tensor"
)


def _per_channel(name: str, value: Tensor | None, x: Tensor) -> Tensor | None:
    """Scale or shift as a (B or 1, C or 1) matrix."""
    if value is None:
        return None
    rows, tail = value.shape[:2], value.shape[2:]
    # A size that is only known at run time is taken as right: comparing it would pin it.
    sizes = zip(rows, x.shape[:2], strict=False)
    fits = value.ndim in (2, x.ndim) and all(isinstance(n, int) and n == 1 for n in tail)
    if not fits or any(isinstance(n, int) and isinstance(m, int) and n not in (1, m) for n, m in sizes):
        batch, channels = x.shape[:2]
        raise UsageError(
            f"group_norm_act: {name} of shape {tuple(value.shape)} does not fit an input of shape {tuple(x.shape)}; "
            f"give ({batch}, {channels}) or ({batch}, {channels}{', 1' * (x.ndim - 2)})"
        )
    return value.flatten(1)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, act: str) -> None:
    activation(act, operator="group_norm_act")
    if not x.is_floating_point():
        raise UsageError(f"group_norm_act: the input is {x.dtype}; give a floating-point tensor")
    if x.ndim < 2:
        raise UsageError(f"group_norm_act: the input has shape {tuple(x.shape)}; give (batch, channels, ...)")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise UsageError(f"group_norm_act: {channels} channels cannot be split into {groups} groups; give a divisor")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and tuple(value.shape) != (channels,):
            raise UsageError(
                f"group_norm_act: {name} has shape {tuple(value.shape)}; the channels ask for ({channels},)"
            )


def group_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    act: str = "none",
) -> Tensor:
    """The operator's implementation, chosen by device; callers usually take ``torch.ops.hasten.group_norm_act``."""
    _check(x, weight, bias, groups, act)
    scale, shift = _per_channel("scale", scale, x), _per_channel("shift", shift, x)
    if x.device.type == "cuda" and x.dtype != torch.float64 and not registry.needs_grad(x, weight, bias, scale, shift):
        from hasten.passes.ops.group_norm_act import triton  # Triton is needed on a GPU only

        return triton.group_norm_act_triton(x, weight, bias, scale, shift, groups, eps, act)
    return cpu.group_norm_act(x, weight, bias, scale, shift, groups, eps, act)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    act: str = "none",
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The definition, in ``dtype``, with the mean taken off before squares are summed (two passes)."""
    wide = x.to(dtype).reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(x.shape[2:]))
    centred = wide - wide.mean(-1, keepdim=True)
    y = (centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)).reshape(x.shape)
    ones = (1,) * (x.ndim - 2)
    if weight is not None:
        y = y * weight.to(dtype).reshape(1, -1, *ones)
    if bias is not None:
        y = y + bias.to(dtype).reshape(1, -1, *ones)
    if scale is not None:
        y = y * scale.to(dtype).reshape(*scale.shape[:2], *ones)
    if shift is not None:
        y = y + shift.to(dtype).reshape(*shift.shape[:2], *ones)
    return ACTIVATIONS[act](y)


registry.register(SCHEMA, group_norm_act)
