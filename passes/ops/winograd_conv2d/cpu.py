"""Winograd convolution in torch operators: what runs where the C++ kernels cannot.

Tiles are worked on in strips of whole tile rows, so that transformed tiles never take more than the workspace: untiled,
a layer of 128 channels at 256x256 was nearly three times slower than the direct convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.passes.ops.activations import activation
from hasten.passes.ops.registry import statistics_dtype
from hasten.passes.ops.winograd_conv2d.transforms import Matrix, transform


def mapped(x: Tensor, norm: Tensor | None, act: str) -> Tensor:
    """``act((x - origin) * scale + shift)``, with the three (B, C) rows of ``norm``."""
    if norm is not None:
        origin, scale, shift = (row.reshape(*row.shape, 1, 1) for row in norm.unbind(0))
        x = (x - origin) * scale + shift
    return activation(act, operator="winograd_conv2d")(x)


def padded(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``x`` with (top, left, bottom, right) more pixels."""
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom), mode="constant" if mode == "zeros" else mode)


def winograd_conv2d(x: Tensor, u: Tensor, tile: int, phases: bool, workspace: int) -> Tensor:
    """Correlate ``x``, already padded, with plain transformed weights (frequencies, C, K); channels last, no bias.

    With ``phases``, x is the small map padded by one, and the result is that of the upsampled one.
    """
    dtype = x.dtype
    f = transform(tile, 2 if phases else 3, normalised=dtype == torch.float16)
    x = x.to(statistics_dtype(dtype))
    batch, channels, height, width = x.shape
    outputs = u.shape[2]
    rows, columns = height - 2, width - 2
    tall, wide = -(-rows // tile), -(-columns // tile)
    need_h, need_w = (tall - 1) * tile + tile + 2, (wide - 1) * tile + tile + 2
    x = F.pad(x, (0, need_w - width, 0, need_h - height)).permute(0, 2, 3, 1)
    count = 4 if phases else 1
    u = u.to(x.dtype).reshape(count, f.t * f.t, channels, outputs)
    strip = max(1, workspace // (f.t * f.t * wide * batch * channels * x.element_size()))
    strips = []
    for first in range(0, tall, strip):
        taken = min(strip, tall - first)
        source = x[:, first * tile : first * tile + taken * tile + 2]
        made = [_strip(source, u[p], f.bt, f.at, tile, f.t, taken, wide, divmod(p, 2)) for p in range(count)]
        if phases:  # (B, tall, m, wide, m, K) of four phases -> rows and columns alternate
            pairs = [torch.stack(made[a * 2 : a * 2 + 2], 5) for a in (0, 1)]
            whole = torch.stack(pairs, 3).reshape(batch, taken * tile * 2, wide * tile * 2, outputs)
        else:
            whole = made[0].reshape(batch, taken * tile, wide * tile, outputs)
        strips.append(whole)
    scale = 2 if phases else 1
    y = torch.cat(strips, 1)[:, : rows * scale, : columns * scale]
    return y.permute(0, 3, 1, 2).to(dtype, memory_format=torch.channels_last)


def _strip(
    x: Tensor, u: Tensor, bt: Matrix, at: Matrix, m: int, t: int, tall: int, wide: int, phase: tuple[int, int]
) -> Tensor:
    """One phase of a strip: (B, H, W, C) -> (B, tall, m, wide, m, K)."""
    a, b = phase
    batch, channels, outputs = x.shape[0], x.shape[3], u.shape[2]
    window = [
        [x[:, a + i : a + i + m * (tall - 1) + 1 : m, b + j : b + j + m * (wide - 1) + 1 : m] for j in range(t)]
        for i in range(t)
    ]
    half = [[_combine(bt[i], [window[k][j] for k in range(t)]) for j in range(t)] for i in range(t)]
    v = torch.stack([_combine(bt[j], half[i]).reshape(-1, channels) for i in range(t) for j in range(t)])
    product = torch.bmm(v, u).reshape(t, t, batch, tall, wide, outputs)
    half = [[_combine(at[i], [product[k, j] for k in range(t)]) for j in range(t)] for i in range(m)]
    return torch.stack([torch.stack([_combine(at[j], half[i]) for j in range(m)], 3) for i in range(m)], 2)


def _combine(row: tuple[Fraction, ...], terms: list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for factor, term in zip(row, terms, strict=True):
        number = float(factor)
        if number:
            part = term if number == 1 else term * number
            total = part if total is None else total + part
    assert total is not None
    return total
