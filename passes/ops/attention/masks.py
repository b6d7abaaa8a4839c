"""Masks as the implementations need them."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(N, M), True where query i may see key j: j <= i (upper left)."""
    return torch.arange(queries, device=device)[:, None] >= torch.arange(keys, device=device)


def merge(mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """``mask`` and the causal one as a single mask of mask's kind; None where neither is asked for."""
    if not causal:
        return mask
    seen = causal_mask(queries, keys, device)[None, None]
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, -torch.inf)


def apply(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with -inf where a bool mask is False, or with a floating mask added."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)
