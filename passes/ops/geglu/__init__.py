"""``hasten::geglu``: (..., 2C) -> (..., C), value * gelu(gate).

value and gate are the halves of the last axis, value first unless gate_first. GEGLU: Shazeer, arXiv 2002.05202.
``approximate`` is "none" (erf) or "tanh", as in ``torch.nn.functional.gelu``. Half-precision input is multiplied and
rounded once, from float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import UsageError, nearest
from hasten.passes.ops import registry
from hasten.passes.ops.geglu import cpu

SCHEMA = "geglu(Tensor x, str approximate, bool gate_first) -> Tensor"
APPROXIMATIONS = ("none", "tanh")


def _check(x: Tensor, approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        hint = nearest(approximate, APPROXIMATIONS)
        raise UsageError(f"geglu: unknown approximation {approximate!r}; use 'none' (erf) or 'tanh'.{hint}")
    if not x.is_floating_point():
        raise UsageError(f"geglu: the input is {x.dtype}; give a floating-point tensor")
    if x.ndim < 1 or x.shape[-1] % 2:
        raise UsageError(
            f"geglu: the last axis of an input of shape {tuple(x.shape)} cannot be halved; give an even one"
        )


def geglu(x: Tensor, approximate: str = "none", gate_first: bool = False) -> Tensor:
    """The operator's implementation, chosen by device; callers usually take ``torch.ops.hasten.geglu``."""
    _check(x, approximate)
    if x.device.type == "cuda" and x.dtype != torch.float64 and not registry.needs_grad(x):
        from hasten.passes.ops.geglu import triton  # Triton is needed on a GPU only

        return triton.geglu_triton(x, approximate, gate_first)
    return cpu.geglu(x, approximate, gate_first)


def reference(
    x: Tensor, approximate: str = "none", gate_first: bool = False, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The definition, in ``dtype``."""
    value, gate = x.to(dtype).chunk(2, -1)
    if gate_first:
        value, gate = gate, value
    return value * torch.nn.functional.gelu(gate, approximate=approximate)


registry.register(SCHEMA, geglu)
