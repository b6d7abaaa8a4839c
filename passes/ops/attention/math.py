"""Attention as it is defined, scores and softmax in float32 at least: what the other two are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.passes.ops.attention import masks
from hasten.passes.ops.registry import statistics_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Arguments are checked by the caller; mask is 4-D or None."""
    acc, repeats = statistics_dtype(q.dtype), q.shape[1] // k.shape[1]
    keys, values = (t.to(acc).repeat_interleave(repeats, 1) if repeats > 1 else t.to(acc) for t in (k, v))
    scores = (q.to(acc) * scale) @ keys.transpose(-1, -2)
    scores = masks.apply(scores, masks.merge(mask, causal, q.shape[2], k.shape[2], q.device))
    if isinstance(k.shape[2], int) and k.shape[2] == 0:
        return (scores @ values).to(q.dtype)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return (torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ values).to(q.dtype)
