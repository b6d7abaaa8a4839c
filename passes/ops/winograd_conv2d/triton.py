"""Winograd convolution on a GPU, in three kernels: transform tiles, multiply them with the weights, transform back.

`_transform_input` reads a window of pixels once, applies the prologue in float32 and leaves V (frequencies, tiles, C);
`_multiply` is one matrix product a frequency on the tensor cores, M (frequencies, tiles, K) in float32;
`_transform_output` applies the epilogue while it writes pixels. V and M go through memory, so tiles are worked on in
chunks that keep both within the workspace; how the tiles are cut into chunks changes no bit of the result.

Float16 tiles use the normalised matrices: no transformed tile is larger than its input, so V cannot overflow where the
map did not. V and U are rounded to float16, once each, and nothing else is but the result: the error is that of
`Transform.expected_error`. Bfloat16 is refused: it has eight times the error, a percent of every output with F(4x4).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.passes.ops.winograd_conv2d.transforms import SUMMED, Matrix, transform


class Product(NamedTuple):
    """What one program of `_multiply` computes (``tiles`` x ``outputs``, ``channels`` a step) and its resources."""

    tiles: int
    outputs: int
    channels: int
    warps: int
    stages: int


PRODUCT = {
    # 64 flop for each byte that a program loads; three stages and the result that leaves take 64 KiB, which every GPU
    # with asynchronous copies (Ampere and later) has; a thread holds 64 accumulators.
    torch.float16: Product(tiles=128, outputs=128, channels=32, warps=8, stages=3),
    # Operands are twice as large, and the tensor cores take each as two halves: a quarter of the outputs, so that
    # nothing leaves the registers. The steps are the sums that `Transform.expected_error` counts with.
    torch.float32: Product(tiles=64, outputs=64, channels=SUMMED, warps=4, stages=3),
}
"""Block sizes of the product, by counting registers and bytes, not by timing. A layer with fewer tiles or channels
takes the next power of two above, 16 at least."""

TRANSFORM_WARPS = 4
PER_THREAD = {2: 4, 4: 2, 6: 1}
"""Elements of every pixel that a thread of a transform holds, by tile. The whole window stays in registers, which are
at most 255: it takes 16, 36 or 64 an element. Several elements make one load of two or four."""
TRANSFORM_CHANNELS = 64
"""Neighbouring channels that a program transforms: 128 bytes of float16, a whole line of the cache."""

WORKSPACE = 256 << 20
"""A sensible bound for callers. The weights are read once a chunk, and T tiles make 2 T flop of each element, so that a
chunk of about 512 tiles is bound by arithmetic on an A100 or an H100; 256 MiB hold F(4x4)'s up to 1280 channels."""


@triton.jit
def _combine(values, rows: tl.constexpr, i: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inner product of ``size`` values and row i of ``rows``, one row after the other; zeros cost nothing."""
    total = 0.0
    for k in tl.static_range(size):
        if rows[i * size + k] != 0:
            total += values[k] * rows[i * size + k]
    return total


@triton.jit
def _both_axes(  # type: ignore[no-untyped-def]
    values,
    rows: tl.constexpr,
    made: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    top: tl.constexpr,
    left: tl.constexpr,
):
    """``made`` x ``made`` values, one row after the other: R d R^T.

    R is ``rows``, d the ``size`` x ``size`` part at (``top``, ``left``) of values that lie ``width`` to a row.
    """
    half = ()
    for i in tl.static_range(made):
        for j in tl.static_range(size):
            column = ()
            for k in tl.static_range(size):
                column += (values[(top + k) * width + left + j],)  # type: ignore[assignment]
            half += (_combine(column, rows, i, size),)  # type: ignore[assignment]
    whole = ()
    for i in tl.static_range(made):
        for j in tl.static_range(made):
            whole += (_combine(half[i * size : i * size + size], rows, j, size),)  # type: ignore[assignment]
    return whole


@triton.jit
def _silu(x):  # type: ignore[no-untyped-def]
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["first", "tiles"])
def _transform_input(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    v_ptr,
    first,
    tiles,
    tall,
    wide,
    batch,
    channels,
    height,
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    v_f,
    top: tl.constexpr,
    left: tl.constexpr,
    bt: tl.constexpr,
    m: tl.constexpr,
    t: tl.constexpr,
    phases: tl.constexpr,
    has_norm: tl.constexpr,
    silu: tl.constexpr,
    block_tiles: tl.constexpr,
    block_channels: tl.constexpr,
):
    """V[f, p] of tiles first + p; with ``phases`` the window is one pixel larger, and four tiles come from it."""
    window: tl.constexpr = t + 1 if phases else t
    p = tl.program_id(0) * block_tiles + tl.arange(0, block_tiles)
    c = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    tile = first + p
    n = tile // (tall * wide)
    y0 = tile // wide % tall * m - top
    x0 = tile % wide * m - left
    use = (p < tiles)[:, None] & (c < channels)[None, :]
    base = x_ptr + n.to(tl.int64)[:, None] * x_n + c.to(tl.int64)[None, :] * x_c
    if has_norm:
        own = n.to(tl.int64)[:, None] * channels + c[None, :]
        rows = batch * channels
        origin = tl.load(norm_ptr + own, mask=use, other=0.0).to(tl.float32)
        scale = tl.load(norm_ptr + rows + own, mask=use, other=0.0).to(tl.float32)
        shift = tl.load(norm_ptr + 2 * rows + own, mask=use, other=0.0).to(tl.float32)
    values = ()
    for i in tl.static_range(window):
        row = y0 + i
        for j in tl.static_range(window):
            column = x0 + j
            inside = use & ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
            at = base + (row.to(tl.int64) * x_h + column.to(tl.int64) * x_w)[:, None]
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if has_norm:
                value = (value - origin) * scale + shift
            if silu:
                value = _silu(value)
            if has_norm:
                value = tl.where(inside, value, 0.0)
            values += (value,)  # type: ignore[assignment]
    to = v_ptr + p.to(tl.int64)[:, None] * channels + c[None, :]
    plane = tl.cast(v_f, tl.int64)
    for a in tl.static_range(2 if phases else 1):
        for b in tl.static_range(2 if phases else 1):
            made = _both_axes(values, bt, t, t, window, a, b)
            for k in tl.static_range(t * t):
                tl.store(to + ((a * 2 + b) * t * t + k) * plane, made[k].to(v_ptr.dtype.element_ty), mask=use)


@triton.jit(do_not_specialize=["tiles"])
def _multiply(  # type: ignore[no-untyped-def]
    v_ptr,
    u_ptr,
    m_ptr,
    tiles,
    channels,
    outputs,
    v_f,
    m_f,
    precision: tl.constexpr,
    block_tiles: tl.constexpr,
    block_outputs: tl.constexpr,
    block_channels: tl.constexpr,
):
    """M[f] = V[f] U[f]. Programs that share a block of tiles run side by side: they find V in the cache."""
    f = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(outputs, block_outputs)
    p = tl.program_id(0) // across * block_tiles + tl.arange(0, block_tiles)
    k = tl.program_id(0) % across * block_outputs + tl.arange(0, block_outputs)
    c = tl.arange(0, block_channels)
    v = v_ptr + f * v_f + p.to(tl.int64)[:, None] * channels + c[None, :]
    u = u_ptr + f * channels * outputs + c.to(tl.int64)[:, None] * outputs + k[None, :]
    total = tl.zeros((block_tiles, block_outputs), tl.float32)
    for done in range(0, channels, block_channels):
        some = c < channels - done
        left = tl.load(v, mask=(p < tiles)[:, None] & some[None, :], other=0.0)
        right = tl.load(u, mask=some[:, None] & (k < outputs)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=precision)
        v += block_channels
        u += block_channels * outputs
    to = m_ptr + f * m_f + p.to(tl.int64)[:, None] * outputs + k[None, :]
    tl.store(to, total, mask=(p < tiles)[:, None] & (k < outputs)[None, :])


@triton.jit(do_not_specialize=["first", "tiles"])
def _transform_output(  # type: ignore[no-untyped-def]
    m_ptr,
    bias_ptr,
    other_ptr,
    y_ptr,
    first,
    tiles,
    tall,
    wide,
    outputs,
    height,
    width,
    m_f,
    y_n,
    y_k,
    y_h,
    y_w,
    other_n,
    other_k,
    other_h,
    other_w,
    at: tl.constexpr,
    m: tl.constexpr,
    t: tl.constexpr,
    phases: tl.constexpr,
    has_bias: tl.constexpr,
    has_other: tl.constexpr,
    silu: tl.constexpr,
    block_tiles: tl.constexpr,
    block_outputs: tl.constexpr,
):
    """The pixels of tiles first + p; with ``phases`` those of one phase, every second row and column."""
    step: tl.constexpr = 2 if phases else 1
    p = tl.program_id(0) * block_tiles + tl.arange(0, block_tiles)
    k = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    phase = tl.program_id(2)
    tile = first + p
    n = (tile // (tall * wide)).to(tl.int64)
    y0 = tile // wide % tall * (m * step) + phase // 2
    x0 = tile % wide * (m * step) + phase % 2
    use = (p < tiles)[:, None] & (k < outputs)[None, :]
    source = m_ptr + phase.to(tl.int64) * (t * t) * m_f + p.to(tl.int64)[:, None] * outputs + k[None, :]
    plane = tl.cast(m_f, tl.int64)
    values = ()
    for f in tl.static_range(t * t):
        values += (tl.load(source + f * plane, mask=use, other=0.0),)  # type: ignore[assignment]
    made = _both_axes(values, at, m, t, t, 0, 0)
    if has_bias:
        bias = tl.load(bias_ptr + k, mask=k < outputs, other=0.0).to(tl.float32)[None, :]
    wide_k = k.to(tl.int64)[None, :]
    for i in tl.static_range(m):
        row = (y0 + i * step).to(tl.int64)
        for j in tl.static_range(m):
            column = (x0 + j * step).to(tl.int64)
            inside = use & ((row < height) & (column < width))[:, None]
            value = made[i * m + j]
            if has_bias:
                value += bias
            if has_other:
                there = (n * other_n + row * other_h + column * other_w)[:, None] + wide_k * other_k
                value += tl.load(other_ptr + there, mask=inside, other=0.0).to(tl.float32)
            if silu:
                value = _silu(value)
            here = (n * y_n + row * y_h + column * y_w)[:, None] + wide_k * y_k
            tl.store(y_ptr + here, value.to(y_ptr.dtype.element_ty), mask=inside)


def winograd_conv2d_triton(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    other: Tensor | None,
    outputs: int,
    tile: int,
    phases: bool,
    padding: list[int],
    act_in: str,
    act_out: str,
    workspace: int,
) -> Tensor:
    """``act_out(conv2d(pad(act_in((x - origin) * scale + shift))) + bias + other)``, channels-last.

    x is (B, C, H, W) with any strides, float32 or float16. ``u``, of x's type, is (frequencies, C, K), from
    `weights.plain_weight`: normalised for float16, as they come for float32. ``norm`` is (3, B, C): origin, scale,
    shift; ``padding`` is (top, left, bottom, right), zeros after the activation. ``other`` broadcasts to the result.
    With ``phases``, x is upsampled twice (nearest) first, and ``padding`` is one on each side. ``workspace`` bounds V
    and M, in bytes.
    """
    f = transform(tile, 2 if phases else 3, normalised=x.dtype == torch.float16)
    _check(x, u, norm, outputs, tile, phases, padding, act_in, act_out)
    batch, channels, height, width = x.shape
    top, left, bottom, right = padding
    step = 2 if phases else 1
    rows, columns = (height + top + bottom - 2) * step, (width + left + right - 2) * step
    y = torch.empty((batch, outputs, rows, columns), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    tall, wide = triton.cdiv(rows, tile * step), triton.cdiv(columns, tile * step)
    total = batch * tall * wide
    product = _product(x.dtype, total, channels, outputs)
    frequencies = u.shape[0]
    each = frequencies * (channels * x.element_size() + outputs * 4)
    capacity = _capacity(total, each, product.tiles, workspace)
    v = torch.empty((frequencies, capacity, channels), dtype=x.dtype, device=x.device)
    m = torch.empty((frequencies, capacity, outputs), dtype=torch.float32, device=x.device)
    u = u.contiguous()
    bias = None if bias is None else bias.contiguous()
    norm = None if norm is None else norm.contiguous()
    other = None if other is None else other.expand(y.shape)
    read, written = _transform_blocks(tile, channels), _transform_blocks(tile, outputs)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for first in range(0, total, capacity):
            tiles = min(capacity, total - first)
            _transform_input[(triton.cdiv(tiles, read[0]), triton.cdiv(channels, read[1]))](
                x,
                x if norm is None else norm,
                v,
                first,
                tiles,
                tall,
                wide,
                batch,
                channels,
                height,
                width,
                *x.stride(),
                v.stride(0),
                top,
                left,
                _constants(f.bt),
                tile,
                f.t,
                phases,
                norm is not None,
                act_in == "silu",
                *read,
                num_warps=TRANSFORM_WARPS,
            )
            blocks = triton.cdiv(tiles, product.tiles) * triton.cdiv(outputs, product.outputs)
            _multiply[(blocks, frequencies)](
                v,
                u,
                m,
                tiles,
                channels,
                outputs,
                v.stride(0),
                m.stride(0),
                _precision(x),
                product.tiles,
                product.outputs,
                product.channels,
                num_warps=product.warps,
                num_stages=product.stages,
            )
            _transform_output[(triton.cdiv(tiles, written[0]), triton.cdiv(outputs, written[1]), 4 if phases else 1)](
                m,
                x if bias is None else bias,
                x if other is None else other,
                y,
                first,
                tiles,
                tall,
                wide,
                outputs,
                rows,
                columns,
                m.stride(0),
                *y.stride(),
                *(y if other is None else other).stride(),
                _constants(f.at),
                tile,
                f.t,
                phases,
                bias is not None,
                other is not None,
                act_out == "silu",
                *written,
                num_warps=TRANSFORM_WARPS,
            )
    return y


def _check(
    x: Tensor,
    u: Tensor,
    norm: Tensor | None,
    outputs: int,
    tile: int,
    phases: bool,
    padding: list[int],
    act_in: str,
    act_out: str,
) -> None:
    f = transform(tile, 2 if phases else 3)
    if x.dtype == torch.bfloat16:
        raise UsageError(
            f"winograd_conv2d: x is bfloat16, and {tile}x{tile} tiles transformed to that type would put every output "
            f"off by {f.expected_error('bfloat16'):.1%}; give float16 or float32, or take the direct convolution"
        )
    if x.dtype not in PRODUCT:
        raise UsageError(f"winograd_conv2d: x is {_name(x.dtype)}; the Triton kernels take float32 and float16")
    if u.dtype != x.dtype:
        raise UsageError(
            f"winograd_conv2d: the transformed weights are {_name(u.dtype)} and x is {_name(x.dtype)}; "
            f"give plain_weight(...).to({x.dtype})"
        )
    expected = (f.t**2 * (4 if phases else 1), x.shape[1], outputs)
    if tuple(u.shape) != expected:
        raise UsageError(
            f"winograd_conv2d: the transformed weights have shape {tuple(u.shape)}; {tile}x{tile} tiles"
            f"{' of four phases' if phases else ''} take {expected}, from plain_weight"
        )
    if norm is not None and tuple(norm.shape) != (3, *x.shape[:2]):
        raise UsageError(
            f"winograd_conv2d: norm has shape {tuple(norm.shape)}; give origin, scale and shift: {(3, *x.shape[:2])}"
        )
    if phases and list(padding) != [1, 1, 1, 1]:
        raise UsageError(f"winograd_conv2d: padding is {list(padding)}; an upsampled map takes [1, 1, 1, 1]")
    for act in (act_in, act_out):
        if act not in ("none", "silu"):
            raise UsageError(f"winograd_conv2d: no activation {act!r}; give 'none' or 'silu'")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _capacity(total: int, each: int, block: int, workspace: int) -> int:
    """Tiles of a chunk: within the workspace, whole blocks where those fit, and chunks of like size."""
    most = workspace // each
    if most < 1:
        raise UsageError(f"winograd_conv2d: workspace is {workspace} bytes, and a single tile takes {each}; give more")
    if most >= total:
        return total
    most = most // block * block or most
    alike = triton.cdiv(total, triton.cdiv(total, most))
    return int(min(most, triton.cdiv(alike, block) * block))


def _product(dtype: torch.dtype, tiles: int, channels: int, outputs: int) -> Product:
    """The blocks of the product, no larger than the layer: of the whole layer, so that chunks change no result."""
    most = PRODUCT[dtype]

    def fit(block: int, size: int) -> int:
        return min(block, max(16, int(triton.next_power_of_2(size))))

    return most._replace(
        tiles=fit(most.tiles, tiles), outputs=fit(most.outputs, outputs), channels=fit(most.channels, channels)
    )


def _transform_blocks(tile: int, channels: int) -> tuple[int, int]:
    """Tiles and channels of a transform's program."""
    across = min(TRANSFORM_CHANNELS, triton.next_power_of_2(channels))
    return 32 * TRANSFORM_WARPS * PER_THREAD[tile] // across, across


def _precision(x: Tensor) -> str:
    """How float32 operands are multiplied: as three products of tf32 halves where the tensor cores have that type."""
    return "tf32x3" if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) else "ieee"


def _constants(rows: Matrix) -> tuple[float, ...]:
    """Row after row: not every version of Triton passes nested tuples of constants on from a kernel."""
    return tuple(float(x) for row in rows for x in row)
