"""Transformed weights in torch: the definition that the kernels' own are compared with, and what they unpack to."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.passes.ops.winograd_conv2d.transforms import Matrix, transform


def matrix(rows: Matrix, dtype: torch.dtype = torch.float64) -> Tensor:
    """Exact rows, rounded once."""
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=dtype)


def phase_taps(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (4, K, C, 2, 2): the taps that fall on one pixel of the small map, added up.

    Phase 0 of an axis sees (w0, w1 + w2), phase 1 (w0 + w1, w2); the row's phase comes first.
    """
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=weight.dtype, device=weight.device)
    return torch.einsum("aik,bjl,ockl->abocij", taps, taps, weight).flatten(0, 1)


def plain_weight(weight: Tensor, tile: int, phases: bool, *, normalised: bool = False) -> Tensor:
    """(K, C, 3, 3) -> (frequencies, C, K) in float64; with ``phases``, those of phase p begin at p * t * t."""
    r = 2 if phases else 3
    g = matrix(transform(tile, r, normalised=normalised).g).to(weight.device)
    wide = weight.to(torch.float64)
    taps = phase_taps(wide) if phases else wide.unsqueeze(0)
    return torch.einsum("ij,pocjk,lk->pilco", g, taps, g).flatten(0, 2)


def unpack(u: Tensor, channels: int, outputs: int) -> Tensor:
    """What `winograd_weight` packed, as (frequencies, C, K)."""
    blocks, p, t, _, padded, width = u.shape
    plain = u.permute(1, 2, 3, 4, 0, 5).reshape(p * t * t, padded, blocks * width)
    return plain[:, :channels, :outputs]


def pack(plain: Tensor, phases: bool, block: int, lanes: int) -> Tensor:
    """(frequencies, C, K) -> (blocks, phases, t, t, C rounded up to ``lanes``, ``block``)."""
    frequencies, channels, outputs = plain.shape
    p = 4 if phases else 1
    t = round((frequencies // p) ** 0.5)
    padded = torch.nn.functional.pad(plain, (0, -outputs % block, 0, -channels % lanes))
    return padded.reshape(p, t, t, padded.shape[1], -1, block).permute(4, 0, 1, 2, 3, 5).contiguous()
