"""Clipping and dynamic thresholding of the predicted x0 in torch, traced into FX and ONNX loops alike.

Limits and ratios are tensors, so that one loop serves any; what `passes.solvers.hooks` does on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(x0: Tensor, limit: Tensor) -> Tensor:
    """x0 (B, ...) within ``-limit .. limit``, () float32."""
    return torch.minimum(torch.maximum(x0, -limit), limit)


def thresholded(x0: Tensor, ratio: Tensor, largest: Tensor, top: int) -> Tensor:
    """x0 (B, ...) within each sample's quantile s, at least 1 and at most ``largest`` () float32, divided by it.

    The quantile is that of ``ratio`` () float32, between values as `torch.quantile` takes it: linear in the rank. Only
    the ``top`` largest values of a sample are put in order, of which there must be as many as `Threshold.top` says.
    """
    size = x0.abs().reshape(x0.shape[0], -1)
    values = size.topk(top, dim=1).values  # descending: rank N - 1 comes first
    last = size.shape[1] - 1
    rank = ratio * last
    below = rank.to(torch.int64).clamp(last + 1 - top, last)
    above = (below + 1).clamp(max=last)
    low, high = (values.index_select(1, (last - n).reshape(1)) for n in (below, above))
    s = low + (rank - below.to(torch.float32)) * (high - low)
    s = torch.minimum(s.clamp(min=1), largest).reshape(-1, *[1] * (x0.ndim - 1))
    return clipped(x0, s) / s
