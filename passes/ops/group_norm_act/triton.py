"""GroupNorm + scale-shift + activation on a GPU: two launches, each parallel over chunks of every group.

`_statistics` reads a chunk once and leaves its (mean, M2); `_apply` combines the chunks of its group by Chan's formula
and writes its part of the result. All values are taken relative to the mean of a few of the group's elements, which is
exact where the mean is large against the standard deviation; a tile's mean is taken off before its squares are summed,
and tiles are combined as chunks are (Chan, Golub and LeVeque 1983), so no square of the mean is ever formed. Float32
throughout, one rounding at the end.

Contiguous and channels-last maps are read as they lie; other layouts are made contiguous first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
_TILES_PER_CHUNK = 8
# One vector holds the statistics of a group's chunks, so chunks grow where a group has more.
_MOST_CHUNKS = 1024


@triton.jit
def _offset(  # type: ignore[no-untyped-def]
    i, channel, pixels, width: tl.constexpr, channels: tl.constexpr, last: tl.constexpr
):
    """Where element i of a group lies within its sample, and which channel of the group it is."""
    if last:
        inside = i % width
        return (i // width) * channels + channel + inside, inside
    inside = i // pixels
    return (channel + inside) * pixels + i % pixels, inside


@triton.jit
def _origin(  # type: ignore[no-untyped-def]
    base, channel, pixels, width: tl.constexpr, channels: tl.constexpr, last: tl.constexpr
):
    """The mean of the group's first 32 elements: of several, because one may be an outlier."""
    i = tl.arange(0, 32).to(tl.int64)
    inside = i < width * pixels
    offset, _ = _offset(i, channel, pixels, width, channels, last)
    values = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(values, 0) / tl.sum(inside.to(tl.float32), 0)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    x_ptr,
    mean_ptr,
    m2_ptr,
    pixels,
    chunks,
    tiles,
    groups: tl.constexpr,
    width: tl.constexpr,
    last: tl.constexpr,
    tile: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = groups * width
    base = x_ptr + (row // groups) * channels * pixels
    channel = (row % groups) * width
    size = width * pixels
    origin = _origin(base, channel, pixels, width, channels, last)
    count, mean, m2 = 0.0, 0.0, 0.0
    for t in range(tiles):
        i = (chunk * tiles + t) * tile + tl.arange(0, tile).to(tl.int64)
        inside = i < size
        offset, _ = _offset(i, channel, pixels, width, channels, last)
        values = tl.where(inside, tl.load(base + offset, mask=inside, other=0.0).to(tl.float32) - origin, 0.0)
        n = tl.sum(inside.to(tl.float32), 0)
        tile_mean = tl.sum(values, 0) / tl.maximum(n, 1.0)
        centred = tl.where(inside, values - tile_mean, 0.0)
        both = tl.maximum(count + n, 1.0)
        delta = tile_mean - mean
        mean += delta * (n / both)
        m2 += tl.sum(centred * centred, 0) + delta * delta * (count * n / both)
        count += n
    tl.store(mean_ptr + row * chunks + chunk, mean)
    tl.store(m2_ptr + row * chunks + chunk, m2)


@triton.jit
def _activate(y, act: tl.constexpr):  # type: ignore[no-untyped-def]
    if act == "silu":
        return y * tl.sigmoid(y)
    if act == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if act == "gelu_tanh":
        return y * tl.sigmoid(y * (1.5957691216057308 + 0.07135481282553106 * y * y))
    if act == "quick_gelu":
        return y * tl.sigmoid(1.702 * y)
    return y


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    mean_ptr,
    m2_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    pixels,
    chunks,
    tiles,
    eps,
    groups: tl.constexpr,
    width: tl.constexpr,
    last: tl.constexpr,
    act: tl.constexpr,
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    has_scale: tl.constexpr,
    has_shift: tl.constexpr,
    tile: tl.constexpr,
    vector: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = groups * width
    sample = row // groups
    base = sample * channels * pixels
    channel = (row % groups) * width
    size = width * pixels

    c = tl.arange(0, vector)
    each = tiles * tile
    n = tl.minimum(tl.maximum(size - c * each, 0), each).to(tl.float32)
    means = tl.load(mean_ptr + row * chunks + c, mask=c < chunks, other=0.0)
    m2s = tl.load(m2_ptr + row * chunks + c, mask=c < chunks, other=0.0)
    mean = tl.sum(means * n, 0) / size
    variance = tl.sum(m2s + n * (means - mean) * (means - mean), 0) / size
    rstd = 1.0 / tl.sqrt(variance + eps)

    origin = _origin(x_ptr + base, channel, pixels, width, channels, last)
    for t in range(tiles):
        i = (chunk * tiles + t) * tile + tl.arange(0, tile).to(tl.int64)
        inside = i < size
        offset, own = _offset(i, channel, pixels, width, channels, last)
        own += channel
        y = ((tl.load(x_ptr + base + offset, mask=inside, other=0.0).to(tl.float32) - origin) - mean) * rstd
        if has_weight:
            y *= tl.load(weight_ptr + own, mask=inside, other=0.0).to(tl.float32)
        if has_bias:
            y += tl.load(bias_ptr + own, mask=inside, other=0.0).to(tl.float32)
        if has_scale:
            y *= tl.load(scale_ptr + sample * channels + own, mask=inside, other=0.0).to(tl.float32)
        if has_shift:
            y += tl.load(shift_ptr + sample * channels + own, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + base + offset, _activate(y, act).to(y_ptr.dtype.element_ty), mask=inside)


def channels_last(x: Tensor) -> bool:
    """Whether x lies in memory as (B, *spatial, C)."""
    return x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: str,
) -> Tensor:
    """Arguments are checked by the caller; scale and shift are (B or 1, C or 1); float64 is not for this kernel."""
    last = channels_last(x)
    if not last:
        x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    batch, channels = x.shape[:2]
    pixels, width = x[0, 0].numel(), channels // groups
    tiles = _TILES_PER_CHUNK
    while triton.cdiv(width * pixels, tiles * TILE) > _MOST_CHUNKS:
        tiles *= 2
    chunks = triton.cdiv(width * pixels, tiles * TILE)
    mean = torch.empty(batch * groups, chunks, dtype=torch.float32, device=x.device)
    m2 = torch.empty_like(mean)
    scale, shift = (None if t is None else t.expand(batch, channels).contiguous() for t in (scale, shift))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    grid = (batch * groups, chunks)
    _statistics[grid](x, mean, m2, pixels, chunks, tiles, groups, width, last, TILE)
    _apply[grid](
        x,
        y,
        mean,
        m2,
        *(x if t is None else t for t in (weight, bias, scale, shift)),
        pixels,
        chunks,
        tiles,
        eps,
        groups,
        width,
        last,
        act,
        *(t is not None for t in (weight, bias, scale, shift)),
        TILE,
        triton.next_power_of_2(chunks),
    )
    return y


@torch.library.custom_op("hasten::group_norm_act_triton", mutates_args=(), device_types="cuda")
def group_norm_act_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: str,
) -> Tensor:
    """`launch` as an operator that compilers leave alone."""
    return launch(x, weight, bias, scale, shift, groups, eps, act)


@group_norm_act_triton.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: str,
) -> Tensor:
    return torch.empty_like(x if channels_last(x) else x.contiguous())
