"""``hasten::group_norm_affine`` and ``hasten::apply_affine``: GroupNorm as statistics, and as one multiply-add.

``group_norm_affine`` reads x (B, C, *spatial) and gives (3, B, C): origin, scale and shift, with which
``(x - origin) * scale + shift`` is the normalised, scaled and shifted map; operands are those of ``group_norm_act``,
scale and shift as (B or 1, C or 1). ``apply_affine`` computes that and an activation ("none" or "silu"). A convolution
that reads the map applies it while loading (``winograd_conv2d``), so the normalised map is never written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.passes.ops import registry
from hasten.passes.ops.activations import activation
from hasten.passes.ops.native.schemas import SCHEMAS


def group_norm_affine(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    """The operator in torch operators; statistics in float32 at least, of x less each group's first mean."""
    batch, channels = x.shape[:2]
    acc = registry.statistics_dtype(x.dtype)
    weight, bias, scale, shift = (None if t is None else t.to(acc) for t in (weight, bias, scale, shift))
    width = channels // groups
    wide = x.to(acc).reshape(batch, groups, width, -1)
    origin = wide[:, :, 0].mean(-1).reshape(batch, groups, 1)
    centred = wide.flatten(2) - origin
    mean = centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred - mean).square().mean(-1, keepdim=True) + eps)
    a = rstd.expand(batch, groups, width).reshape(batch, channels)
    if weight is not None:
        a = a * weight
    b = torch.zeros_like(a) if bias is None else bias.expand(batch, channels)
    if scale is not None:
        a, b = a * scale, b * scale
    if shift is not None:
        b = b + shift
    origins = (origin + mean).expand(batch, groups, width).reshape(batch, channels)
    return torch.stack((origins, a, b)).to(acc)


def _affine_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    if x.ndim < 2 or x.shape[1] % groups:
        raise UsageError(f"group_norm_affine: an input of shape {tuple(x.shape)} has no {groups} groups of channels")
    return x.new_empty((3, *x.shape[:2]), dtype=registry.statistics_dtype(x.dtype))


def apply_affine(x: Tensor, affine: Tensor, act: str = "none") -> Tensor:
    """The operator in torch operators."""
    origin, scale, shift = (row.reshape(*row.shape, *(1,) * (x.ndim - 2)) for row in affine.unbind(0))
    return activation(act, operator="apply_affine")((x - origin) * scale + shift).to(x.dtype)


def _apply_fake(x: Tensor, affine: Tensor, act: str = "none") -> Tensor:
    if act not in ("none", "silu"):
        raise UsageError(f"apply_affine: no activation {act!r}; give 'none' or 'silu'")
    if x.ndim == 4 and not x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.channels_last)
    if x.ndim == 5 and not x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.channels_last_3d)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


registry.register_opaque(SCHEMAS["GROUP_NORM_AFFINE"], group_norm_affine, _affine_fake)
registry.register_opaque(SCHEMAS["APPLY_AFFINE"], apply_affine, _apply_fake)
