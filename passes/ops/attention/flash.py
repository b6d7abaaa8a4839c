"""``hasten::flash_attention``: softmax(scale q k^T) v in float32 on a CPU, the scores never written.

q is (B, H, N, D), k (B, Hk, M, D), v (B, Hk, M, Dv); Hk divides H, as for ``hasten::attention``. There are no masks.
The result, (B, H, N, Dv), lies in memory as (B, N, H, Dv), which merging the heads reads without a copy; torch's own
kernel does the same. Without keys it is 0. On a CPU the C++ kernel runs; where it is not loaded, and
elsewhere, `sdpa` does.
"""

from __future__ import annotations

from torch import Tensor

from hasten.errors import UsageError
from hasten.passes.ops import registry
from hasten.passes.ops.attention import sdpa
from hasten.passes.ops.native.schemas import SCHEMAS

WIDEST = 512
"""D and Dv up to which the kernel was measured: wider heads are computed all the same."""


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The operator in torch operators."""
    _check(q, k, v)
    return sdpa.attention(q, k, v, None, scale, False).transpose(1, 2).contiguous().transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check(q, k, v)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    found = f"flash_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise UsageError(f"{found}; give (batch, heads, tokens, width) each")
    equal = ((q.shape[0], k.shape[0]), (q.shape[3], k.shape[3]), *zip(k.shape[:3], v.shape[:3], strict=True))
    # Two sizes that are only known at the call are compared there.
    if any(isinstance(n, int) and isinstance(m, int) and n != m for n, m in equal):
        raise UsageError(f"{found}; q and k must have the same batch and width, k and v the same heads and tokens")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise UsageError(f"{found}; the heads of k must divide those of q")


registry.register_opaque(SCHEMAS["FLASH_ATTENTION"], flash_attention, _fake)
