"""``hasten::attention``: softmax(scale q k^T + mask) v, softmax in float32 at least, one node in a graph.

q is (B, H, N, D), k (B, Hk, M, D), v (B, Hk, M, Dv); Hk divides H, and query head h reads key head h // (H / Hk). mask
is bool (True = may attend) or floating (added), broadcastable to (B, H, N, M). causal lets query i see keys 0..i
(upper left, as torch's ``is_causal``). A row without any key gives 0.

Three implementations: `sdpa` (torch's flash kernels where they apply), `pfsm` (partially fused softmax, arXiv
2304.11267) and `math` (the definition). Which one runs is decided by the rows of `select`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hasten.errors import UsageError, nearest
from hasten.passes.ops import registry
from hasten.passes.ops.attention import flash as flash
from hasten.passes.ops.attention import math, pfsm, sdpa
from hasten.passes.ops.attention.select import select

SCHEMA = "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor"
IMPLEMENTATIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"sdpa": sdpa.attention, "pfsm": pfsm.attention, "math": math.attention}
)


def _known(size: int) -> int | None:
    """A size as a number, or None where it is only known at run time."""
    return size if isinstance(size, int) else None


def _differ(one: int, other: int) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one != other


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise UsageError(f"attention: {found}; give (batch, heads, tokens, width) each")
    if _differ(q.shape[0], k.shape[0]) or _differ(k.shape[0], v.shape[0]):
        raise UsageError(f"attention: {found}; the batch sizes must be equal")
    if _differ(q.shape[3], k.shape[3]):
        raise UsageError(f"attention: {found}; q and k must have the same width")
    if _differ(k.shape[1], v.shape[1]) or _differ(k.shape[2], v.shape[2]):
        raise UsageError(f"attention: {found}; k and v must have the same heads and tokens")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise UsageError(f"attention: {found}; the heads of k must divide those of q")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UsageError(
            f"attention: the mask is {mask.dtype}; give a bool (True = may attend) or floating (added) one"
        )
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.ndim > 4 or any(_differ(n, m) and n != 1 for n, m in sizes):
        raise UsageError(f"attention: a mask of shape {tuple(mask.shape)} cannot be broadcast to the scores {scores}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    *,
    rule: str = "default",
    implementation: str | None = None,
) -> Tensor:
    """Attention by the implementation that ``rule`` selects, or by the one named ``implementation``.

    ``rule`` is a name in ``select.RULES``, ``implementation`` one of "sdpa", "pfsm", "math". The torch operator
    ``hasten::attention`` is this function with the default rule. scale None is D ** -0.5.
    """
    _check(q, k, v, mask)
    if implementation is None:
        n, m, d, dv = (_known(size) for size in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
        masked = mask is not None or causal
        implementation, _ = select(rule, q.device.type, q.dtype, n, m, d, dv, masked, q.shape[1])
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(
            f"attention: unknown implementation {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}."
            f"{nearest(implementation, IMPLEMENTATIONS)}"
        )
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    return IMPLEMENTATIONS[implementation](q, k, v, mask, q.shape[3] ** -0.5 if scale is None else scale, causal)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The definition, in ``dtype``."""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    return attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, scale, causal, implementation="math")


registry.register(SCHEMA, attention)
