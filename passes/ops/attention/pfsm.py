"""Partially fused softmax: "Speed Is All You Need" (arXiv 2304.11267), section 3.2; ML Drift's softmax.cc.

The first product is written out; a reduction leaves two numbers a row, L = max and S = sum exp(score - L); the second
product takes exp(score - L) and is divided by S afterwards, N * Dv divisions instead of N * M. Scores and both
statistics are float32 at least: the relative error of a probability is |score| 2^-11 with scores in float16. A row of
-inf has L = 0 and S = 1, so it gives 0. The paper folds the scale into q, which keeps scores small.

Heads are worked off a few at a time where N * M is large, by ML Drift's table, so that scores never take more than
about 64 MB a sample. With N or M only known at run time all heads are taken at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.passes.ops.attention import masks
from hasten.passes.ops.registry import needs_grad, runs_eagerly, statistics_dtype

# At N * M of at least the first number, that many heads at a time (ML Drift's generic GPU row).
HEAD_TILES = ((4096 * 4096, 1), (4096 * 2048, 2), (2048 * 2048, 4), (2048 * 1024, 8))


def heads_at_once(queries: int, keys: int, heads: int) -> int:
    """How many heads' scores to hold at a time."""
    if not (isinstance(queries, int) and isinstance(keys, int)):
        return heads
    return min(heads, next((tile for least, tile in HEAD_TILES if queries * keys >= least), heads))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Arguments are checked by the caller; mask is 4-D or None."""
    batch, heads, queries, _ = q.shape
    shared, keys, width = k.shape[1], k.shape[2], v.shape[3]
    if isinstance(keys, int) and keys == 0:
        return q.new_zeros(batch, heads, queries, width)
    acc, repeats = statistics_dtype(q.dtype), heads // shared
    mask = masks.merge(mask, causal, queries, keys, q.device)
    step = max(1, heads_at_once(queries, keys, heads) // repeats)
    tiles = []
    for start in range(0, shared, step):
        stop = min(start + step, shared)
        count, rows = stop - start, slice(start * repeats, stop * repeats)
        # The query heads that share a key head are rows of one product: keys and values are never repeated.
        tile = (q[:, rows].to(acc) * scale).reshape(batch * count, repeats * queries, q.shape[3])
        their_keys = k[:, start:stop].to(acc).reshape(batch * count, keys, k.shape[3])
        their_values = v[:, start:stop].to(acc).reshape(batch * count, keys, width)
        scores = torch.bmm(tile, their_keys.transpose(1, 2))
        if mask is not None:
            part = mask[:, :, None] if mask.shape[1] == 1 else mask[:, rows].unflatten(1, (count, repeats))
            scores = masks.apply(scores.reshape(batch, count, repeats, queries, keys), part)
            scores = scores.reshape(batch * count, repeats * queries, keys)
        # Axes are split and merged one after the other: a view that does both at once puts guards on symbolic sizes.
        tiles.append(_weighted(scores, their_values).reshape(batch, count, repeats, queries, width).flatten(1, 2))
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1)).to(q.dtype)


def _weighted(scores: Tensor, values: Tensor) -> Tensor:
    largest = scores.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0).detach()
    in_place = runs_eagerly(scores) and not needs_grad(scores)
    weights = scores.sub_(largest).exp_() if in_place else torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights, values) / total.masked_fill(total == 0, 1.0)
