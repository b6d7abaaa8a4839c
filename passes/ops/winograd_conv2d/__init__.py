"""``hasten::winograd_conv2d``: a 3x3 convolution with stride 1, computed in tiles with fewer multiplications.

x is (B, C, H, W) in any memory format, weight (K, C, 3, 3) or what ``hasten::winograd_weight`` made of it, bias (K,).
``norm`` is (3, B, C): origin, scale and shift, from ``hasten::group_norm_affine``. The result, (B, K, H', W'), is
always channels-last::

    y = act_out(conv2d(pad(act_in((x - origin) * scale + shift)), weight) + bias + other)

The map is padded after the activation, by (top, left, bottom, right), with zeros or as `torch.nn.functional.pad` names
the modes. ``other`` is (B, K, H', W'), or has ones for B, H' and W'. With ``phases`` the map is upsampled twice
(nearest) before it is padded by one; the upsampled map is never made. ``tile`` is m of F(m x m, 3x3): 2, 4 or 6, and
2 or 4 with phases. ``workspace`` bounds the transformed tiles, in bytes.

Lavin and Gray, arXiv 1509.09308; the error is that of `transforms.Transform.expected_error`. A NaN or an infinity
spreads over the outputs of the tiles that read it, further than in a direct convolution.

On a CPU the C++ kernels run; they keep what they made of weights of shape (K, C, 3, 3) as long as those live, and make
it again when they change: when their version counter or the hash of their numbers does. The counter sees every write
but those through ``.data``, through numpy and to inference tensors. For these up to 2**18 numbers are all hashed, and
of larger weights about as many, at even steps, 64 or more of every output: a write that changes the whole of any filter
is noticed, one that changes single numbers may not be; make such writes in place, under ``torch.no_grad()``.
Elsewhere torch operators or Triton do, and transform weights of that shape anew in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hasten.errors import UsageError
from hasten.passes.ops import registry
from hasten.passes.ops.activations import activation
from hasten.passes.ops.native import build
from hasten.passes.ops.native.schemas import CHUNK_BYTES, SCHEMAS
from hasten.passes.ops.winograd_conv2d import cpu, select
from hasten.passes.ops.winograd_conv2d.weights import pack, plain_weight, unpack

TILES = {False: select.TILES["conv2d"], True: select.TILES["upsample_conv2d"]}
MODES = ("zeros", "reflect", "replicate", "circular")


def winograd_weight(weight: Tensor, tile: int, phases: bool = False) -> Tensor:
    """(K, C, 3, 3) -> (blocks, phases, t, t, C, block), transformed in float64, in ``weight``'s type."""
    _check_tile(tile, phases)
    block, lanes = _packing(weight.device.type, weight.dtype, weight.shape[0])
    return pack(_plain(weight, tile, phases).to(weight.dtype), phases, block, lanes)


def _plain(weight: Tensor, tile: int, phases: bool) -> Tensor:
    """Float16 could not hold tiles of the plain transforms: those of the normalised ones are no larger than the map."""
    return plain_weight(weight, tile, phases, normalised=weight.dtype == torch.float16)


def _weight_fake(weight: Tensor, tile: int, phases: bool = False) -> Tensor:
    _check_tile(tile, phases)
    if weight.ndim != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise UsageError(f"winograd_weight: the weight has shape {tuple(weight.shape)}; give (outputs, channels, 3, 3)")
    outputs, channels = weight.shape[:2]
    block, lanes = _packing(weight.device.type, weight.dtype, outputs)
    t, p = tile + (1 if phases else 2), 4 if phases else 1
    return weight.new_empty((-(-outputs // block), p, t, t, -(-channels // lanes) * lanes, block))


def _packing(device: str, dtype: torch.dtype, outputs: int) -> tuple[int, int]:
    """(block of output channels, multiple of input channels) of transformed weights: the kernels', or none."""
    if device in ("cpu", "meta") and dtype == torch.float32 and build.available():
        return native_block(), select.LANES
    return outputs, 1


@cache
def native_block() -> int:
    """Output channels that the C++ kernels of this processor work on together."""
    with unset_fake_temporarily():
        return int(torch.ops.hasten.winograd_weight(torch.zeros(1, 1, 3, 3), 2).shape[-1])


def _check_tile(tile: int, phases: bool) -> None:
    if tile not in TILES[phases]:
        which = "the phases of an upsampled map" if phases else "a 3x3 convolution"
        raise UsageError(f"winograd_conv2d: no tile of {tile} for {which}; tiles: {', '.join(map(str, TILES[phases]))}")


def _output_shape(
    x: Tensor, weight: Tensor, outputs: int, tile: int, phases: bool, padding: Sequence[int], mode: str
) -> tuple[int, int, int, int]:
    _check_tile(tile, phases)
    if x.ndim != 4:
        raise UsageError(
            f"winograd_conv2d: the input has shape {tuple(x.shape)}; give (batch, channels, height, width)"
        )
    if mode not in MODES:
        raise UsageError(f"winograd_conv2d: padding_mode {mode!r} is none of {', '.join(MODES)}")
    if len(padding) != 4 or any(pad < 0 for pad in padding):
        raise UsageError(f"winograd_conv2d: padding is {list(padding)}; give [top, left, bottom, right]")
    if weight.ndim == 4 and (tuple(weight.shape[2:]) != (3, 3) or weight.shape[0] != outputs):
        raise UsageError(
            f"winograd_conv2d: the weight has shape {tuple(weight.shape)}; give ({outputs}, {x.shape[1]}, 3, 3)"
        )
    if weight.ndim == 4 and weight.shape[1] != x.shape[1]:
        raise UsageError(f"winograd_conv2d: {x.shape[1]} channels come in, and the weight has {weight.shape[1]}")
    if weight.ndim not in (4, 6):
        raise UsageError(f"winograd_conv2d: the weight has {weight.ndim} axes; give (outputs, channels, 3, 3)")
    batch, _, height, width = x.shape
    if phases:
        if list(padding) != [1, 1, 1, 1] or mode != "zeros":
            raise UsageError("winograd_conv2d: an upsampled map is padded by one row of zeros on each side")
        return batch, outputs, 2 * height, 2 * width
    top, left, bottom, right = padding
    return batch, outputs, height + top + bottom - 2, width + left + right - 2


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    other: Tensor | None,
    outputs: int,
    tile: int,
    phases: bool = False,
    padding: Sequence[int] = (1, 1, 1, 1),
    padding_mode: str = "zeros",
    act_in: str = "none",
    act_out: str = "none",
    workspace: int = CHUNK_BYTES,
) -> Tensor:
    shape = _output_shape(x, weight, outputs, tile, phases, padding, padding_mode)
    for act in (act_in, act_out):
        if act not in ("none", "silu"):
            raise UsageError(f"winograd_conv2d: no activation {act!r}; give 'none' or 'silu'")
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    other: Tensor | None,
    outputs: int,
    tile: int,
    phases: bool = False,
    padding: Sequence[int] = (1, 1, 1, 1),
    padding_mode: str = "zeros",
    act_in: str = "none",
    act_out: str = "none",
    workspace: int = CHUNK_BYTES,
) -> Tensor:
    """The operator's form for devices without a C++ kernel, and the meaning of all its arguments."""
    shape = _output_shape(x, weight, outputs, tile, phases, padding, padding_mode)
    if 0 in shape or 0 in x.shape:
        return torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    # A GPU's weights of four axes are transformed in each call: only where torch.compile passes them in; no kernel's
    # time there was measured yet, so nothing is kept.
    plain = _plain(weight, tile, phases) if weight.ndim == 4 else unpack(weight, x.shape[1], outputs)
    if x.device.type == "cuda" and x.dtype in (torch.float32, torch.float16):
        from hasten.passes.ops.winograd_conv2d import triton  # Triton is needed on a GPU only

        if padding_mode != "zeros":
            x, norm, act_in = cpu.padded(cpu.mapped(x, norm, act_in), padding, padding_mode), None, "none"
            padding = (0, 0, 0, 0)
        return triton.winograd_conv2d_triton(
            x,
            plain.to(x.dtype),
            bias,
            norm,
            other,
            outputs,
            tile,
            phases,
            list(padding),
            act_in,
            act_out,
            max(workspace, triton.WORKSPACE),
        )
    map_ = cpu.padded(cpu.mapped(x, norm, act_in), list(padding), padding_mode)
    y = cpu.winograd_conv2d(map_, plain, tile, phases, workspace)
    if bias is not None:
        y = y + bias.reshape(1, -1, 1, 1)
    if other is not None:
        y = y + other
    return activation(act_out, operator="winograd_conv2d")(y).contiguous(memory_format=torch.channels_last)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    other: Tensor | None = None,
    *,
    phases: bool = False,
    padding: Sequence[int] = (1, 1, 1, 1),
    padding_mode: str = "zeros",
    act_in: str = "none",
    act_out: str = "none",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The definition, in ``dtype``, from weights of shape (K, C, 3, 3)."""
    x, weight = x.to(dtype), weight.to(dtype)
    bias, norm, other = (None if t is None else t.to(dtype) for t in (bias, norm, other))
    map_ = cpu.mapped(x, norm, act_in)
    if phases:
        map_ = F.interpolate(map_, scale_factor=2.0, mode="nearest")
    y = F.conv2d(cpu.padded(map_, list(padding), padding_mode), weight, bias)
    return activation(act_out, operator="winograd_conv2d")(y if other is None else y + other)


registry.register_opaque(SCHEMAS["WINOGRAD_WEIGHT"], winograd_weight, _weight_fake)
registry.register_opaque(SCHEMAS["WINOGRAD_CONV2D"], winograd_conv2d, _fake)
