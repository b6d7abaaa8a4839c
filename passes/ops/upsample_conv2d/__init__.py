"""``hasten::upsample_conv2d``: nearest 2x upsampling, then a 3x3 convolution with stride 1 and padding 1.

x is (B, C, H, W), weight (K, C, 3, 3), bias (K,) or None; the result is (B, K, 2H, 2W). Computed on the small map:
each of the four phases of the output sees a 2x2 window of x, with those taps of the 3x3 kernel added up that fall on
one pixel. Exact but for rounding, 2.25 times fewer multiplications, and the upsampled map is never written. The taps
are added in float32 at least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UsageError
from hasten.passes.ops import registry
from hasten.passes.ops.upsample_conv2d import phases
from hasten.passes.ops.upsample_conv2d.select import select

SCHEMA = "upsample_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    found = f"input {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if x.ndim != 4 or weight.ndim != 4:
        raise UsageError(f"upsample_conv2d: {found}; give (batch, channels, height, width), (outputs, channels, 3, 3)")
    if tuple(weight.shape[2:]) != (3, 3):
        raise UsageError(f"upsample_conv2d: {found}; the kernel must be 3x3")
    if x.shape[1] != weight.shape[1]:
        raise UsageError(f"upsample_conv2d: {found}; the weight must have as many input channels as the input")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise UsageError(f"upsample_conv2d: {found}; bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},)")


def direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The two operators as they are written in a model."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """The operator's implementation; ``implementation`` ("phases" or "direct") overrides the rule in `select`."""
    _check(x, weight, bias)
    if implementation is None:
        batch, channels, height, width = (n if isinstance(n, int) else None for n in x.shape)
        implementation, _ = select(x.device.type, batch, channels, weight.shape[0], height, width)
    if implementation not in ("phases", "direct"):
        raise UsageError(f"upsample_conv2d: unknown implementation {implementation!r}; use 'phases' or 'direct'")
    return (phases.upsample_conv2d if implementation == "phases" else direct)(x, weight, bias)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The definition, in ``dtype``."""
    return direct(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


registry.register(SCHEMA, upsample_conv2d)
