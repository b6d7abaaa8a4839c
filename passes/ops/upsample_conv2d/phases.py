"""The four phases as one transposed convolution, 4x4 with stride 2 and padding 1, on the small map.

Along one axis, out[2i] = w0 x[i-1] + (w1 + w2) x[i] and out[2i+1] = (w0 + w1) x[i] + w2 x[i+1]. A transposed
convolution whose taps are (w2, w1 + w2, w0 + w1, w0) adds exactly these products; zero padding carries over unchanged.
Against four separate 2x2 convolutions it needs no interleaving of their outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.passes.ops.registry import statistics_dtype


def phase_weight(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (C, K, 4, 4), the transposed convolution's weight, summed in float32 at least."""
    rows = _taps(weight.to(statistics_dtype(weight.dtype)), 2)
    # One stack for all sixteen: Inductor writes it in one loop.
    taps = torch.stack([tap for row in rows for tap in _taps(row, 2)], -1)
    return taps.reshape(*weight.shape[:2], 4, 4).transpose(0, 1).to(weight.dtype)


def _taps(weight: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, middle, last = weight.unbind(axis)
    return last, middle + last, first + middle, first


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments are checked by the caller."""
    return F.conv_transpose2d(x, phase_weight(weight), bias, stride=2, padding=1)
