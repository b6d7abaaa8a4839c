"""GEGLU on a GPU: one launch, two reads and a write, the product formed in float32 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _geglu(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, width, value_at, gate_at, tanh: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    source = x_ptr + row * 2 * width + column
    value = tl.load(source + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + gate_at, mask=inside, other=0.0).to(tl.float32)
    if tanh:  # 0.5 (1 + tanh u) = sigmoid(2u)
        gate = gate * tl.sigmoid(gate * (1.5957691216057308 + 0.07135481282553106 * gate * gate))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y_ptr + row * width + column, (value * gate).to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, approximate: str, gate_first: bool) -> Tensor:
    """Arguments are checked by the caller. float64 input is not for this kernel."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel() > 0:
        value_at, gate_at = (width, 0) if gate_first else (0, width)
        grid = (y.numel() // width, triton.cdiv(width, BLOCK))
        _geglu[grid](x, y, width, value_at, gate_at, approximate == "tanh", BLOCK)
    return y


@torch.library.custom_op("hasten::geglu_triton", mutates_args=(), device_types="cuda")
def geglu_triton(x: Tensor, approximate: str, gate_first: bool) -> Tensor:
    """`launch` as an operator that compilers leave alone."""
    return launch(x, approximate, gate_first)


@geglu_triton.register_fake
def _(x: Tensor, approximate: str, gate_first: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
