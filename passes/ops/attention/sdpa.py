"""Attention by ``torch.nn.functional.scaled_dot_product_attention``, arranged so that its flash kernels apply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.passes.ops.attention import masks


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Arguments are checked by the caller; mask is 4-D or None."""
    if mask is not None:  # torch takes a mask or is_causal, not both
        mask, causal = masks.merge(mask, causal, q.shape[2], k.shape[2], q.device), False
        assert mask is not None
        if mask.dtype not in (torch.bool, torch.float32, q.dtype):
            mask = mask.to(q.dtype if q.dtype == torch.float64 else torch.float32)
    # Every flash kernel wants the width innermost; a copy is cheaper than the scores that the math kernel writes.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    grouped, width, value_width = bool(q.shape[1] != k.shape[1]), q.shape[3], v.shape[3]
    if q.device.type == "cpu" and isinstance(width, int) and isinstance(value_width, int) and width != value_width:
        # The CPU flash kernel needs equal widths. Zeros change nothing, and it stays 1.5 to 2 times as fast with them.
        common = max(width, value_width)
        q, k, v = (F.pad(t, (0, common - t.shape[3])) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y[..., :value_width]
