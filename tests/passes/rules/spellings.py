"""Attention as the diffusion and language zoo spells it: name -> (function of q, k, v [, mask], layout, mask kind).

Collected from CompVis, diffusers (classic processors), guided-diffusion, timm, BERT/DistilBERT/GPT-2/T5 in
transformers, NCSN++/VAE attention blocks, and the forms in which exporters write the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Spelling = Callable[..., torch.Tensor]
C = 8**-0.5


@dataclass(frozen=True)
class Case:
    """``layout``: bhnd, bnhd (heads after rows) or bnd (heads merged into the batch).

    ``mask``: none, float, bool, int.
    """

    function: Spelling
    layout: str = "bhnd"
    mask: str = "none"


def kt(k: torch.Tensor) -> torch.Tensor:
    return k.transpose(-2, -1)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 1, 3)


def causal(n: int, m: int) -> torch.Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril()


def manual_softmax(s: torch.Tensor) -> torch.Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def merged(q: torch.Tensor) -> torch.Tensor:
    return q.reshape(q.shape[0] * q.shape[1], q.shape[2], q.shape[3])


def vae_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w = torch.bmm(q, k.permute(0, 2, 1)) * C
    w = F.softmax(w, dim=2).permute(0, 2, 1)
    return torch.bmm(v.permute(0, 2, 1), w).permute(0, 2, 1)


def guided_diffusion(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scale = 1 / math.sqrt(math.sqrt(8))
    q, k, v = kt(q), kt(k), kt(v)  # channels before rows
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return kt(torch.einsum("bts,bcs->bct", weight, v))


def mbart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    b, h, n, d = q.shape
    s = torch.bmm(merged(q), merged(k).transpose(1, 2)).view(b, h, n, -1) + m
    p = torch.softmax(s.view(b * h, n, -1), dim=-1)
    return torch.bmm(p, merged(v)).view(b, h, n, d)


CASES: dict[str, Case] = {
    "scores-divided": Case(lambda q, k, v: (q @ kt(k) / 2.5).softmax(-1) @ v),
    "scores-multiplied": Case(lambda q, k, v: (q @ kt(k) * C).softmax(-1) @ v),
    "query-multiplied": Case(lambda q, k, v: ((q * C) @ kt(k)).softmax(-1) @ v),
    "query-divided": Case(lambda q, k, v: ((q / 2.5) @ kt(k)).softmax(-1) @ v),
    "key-multiplied": Case(lambda q, k, v: (q @ kt(k * C)).softmax(-1) @ v),
    "key-multiplied-after-transpose": Case(lambda q, k, v: (q @ (kt(k) * C)).softmax(-1) @ v),
    "root-on-both-sides": Case(lambda q, k, v: ((q * C**0.5) @ (kt(k) * C**0.5)).softmax(-1) @ v),
    "scale-three-times": Case(lambda q, k, v: ((q * 0.5) @ kt(k / 2) * 1.5).softmax(-1) @ v),
    "no-scale": Case(lambda q, k, v: (q @ kt(k)).softmax(-1) @ v),
    "number-first": Case(lambda q, k, v: (C * (q @ kt(k))).softmax(-1) @ v),
    "einsum-heads": Case(
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * C, -1), v)
    ),
    "einsum-rows-before-heads": Case(
        lambda q, k, v: torch.einsum(
            "bhnm,bmhd->bnhd", torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * C, -1), v
        ),
        "bnhd",
    ),
    "einsum-compvis": Case(
        lambda q, k, v: torch.einsum(
            "b i j, b j d -> b i d", (torch.einsum("b i d, b j d -> b i j", q, k) * C).softmax(dim=-1), v
        ),
        "bnd",
    ),
    "bmm": Case(lambda q, k, v: torch.bmm(torch.bmm(q, kt(k)).softmax(-1), v), "bnd"),
    "bmm-scaled": Case(lambda q, k, v: torch.bmm((torch.bmm(q, kt(k)) * C).softmax(-1), v), "bnd"),
    "baddbmm-empty": Case(
        lambda q, k, v: torch.bmm(
            torch.baddbmm(
                torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype), q, kt(k), beta=0, alpha=C
            ).softmax(-1),
            v,
        ),
        "bnd",
    ),
    "baddbmm-mask": Case(
        lambda q, k, v, m: torch.bmm(torch.baddbmm(m, q, kt(k), beta=1, alpha=C).softmax(-1), v), "bnd", "float-bnd"
    ),
    "baddbmm-half-mask": Case(
        lambda q, k, v, m: torch.bmm(torch.baddbmm(m, q, kt(k), beta=0.5, alpha=C).softmax(-1), v), "bnd", "float-bnd"
    ),
    "upcast-softmax": Case(lambda q, k, v: F.softmax(q @ kt(k) * C, -1, dtype=torch.float32).to(q.dtype) @ v),
    "upcast-scores": Case(lambda q, k, v: ((q @ kt(k)).float() * C).softmax(-1).type_as(q) @ v),
    "upcast-bmm": Case(lambda q, k, v: torch.bmm((torch.bmm(q, kt(k)) * C).float().softmax(-1).to(v.dtype), v), "bnd"),
    "rows-before-heads": Case(lambda q, k, v: heads((heads(q) @ kt(heads(k)) / 2.5).softmax(-1) @ heads(v)), "bnhd"),
    "rows-before-heads-query-scaled": Case(
        lambda q, k, v: ((heads(q) * C) @ kt(heads(k))).softmax(-1) @ heads(v), "bnhd"
    ),
    "rows-before-heads-query-divided": Case(
        lambda q, k, v: ((heads(q) / 2.5) @ kt(heads(k))).softmax(-1) @ heads(v), "bnhd"
    ),
    "heads-merged-by-reshape": Case(
        lambda q, k, v: torch.bmm((torch.bmm(merged(q), kt(merged(k))) * C).softmax(-1), merged(v)).reshape(q.shape)
    ),
    "float-mask-after-division": Case(lambda q, k, v, m: (q @ kt(k) / 2.5 + m).softmax(-1) @ v, mask="float"),
    "float-mask-after-product": Case(lambda q, k, v, m: (q @ kt(k) * C + m).softmax(-1) @ v, mask="float"),
    "float-mask-first": Case(lambda q, k, v, m: (m + q @ kt(k) * C).softmax(-1) @ v, mask="float"),
    "float-mask-before-scale": Case(lambda q, k, v, m: ((q @ kt(k) + m) * C).softmax(-1) @ v, mask="float"),
    "float-mask-subtracted": Case(lambda q, k, v, m: (q @ kt(k) * C - m).softmax(-1) @ v, mask="float"),
    "two-masks": Case(lambda q, k, v, m: ((q @ kt(k) * C + m) + m).softmax(-1) @ v, mask="float"),
    "masked-fill-infinity": Case(
        lambda q, k, v, m: (q @ kt(k) * C).masked_fill(m, float("-inf")).softmax(-1) @ v, mask="bool"
    ),
    "masked-fill-smallest": Case(
        lambda q, k, v, m: (q @ kt(k) * C).masked_fill(m, torch.finfo(q.dtype).min).softmax(-1) @ v, mask="bool"
    ),
    "masked-fill-negated": Case(lambda q, k, v, m: (q @ kt(k) * C).masked_fill(~m, -1e4).softmax(-1) @ v, mask="bool"),
    "where": Case(
        lambda q, k, v, m: torch.where(m, q @ kt(k) * C, torch.finfo(q.dtype).min).softmax(-1) @ v, mask="bool"
    ),
    "where-then-added": Case(
        lambda q, k, v, m: (torch.where(m, q @ kt(k) * C, float("-inf")) + m.to(q.dtype)).softmax(-1) @ v, mask="bool"
    ),
    "integer-mask-equals-zero": Case(
        lambda q, k, v, m: (q @ kt(k) * C).masked_fill((m == 0), float("-inf")).softmax(-1) @ v, mask="int"
    ),
    "causal-triu": Case(
        lambda q, k, v: (q @ kt(k) * C + torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)).softmax(-1) @ v,
        "square",
    ),
    "causal-where": Case(
        lambda q, k, v: torch.where(causal(q.shape[2], q.shape[2]), q @ kt(k) * C, float("-inf")).softmax(-1) @ v,
        "square",
    ),
    "zero-mask": Case(lambda q, k, v: (q @ kt(k) * C + torch.zeros(q.shape[2], k.shape[2])).softmax(-1) @ v),
    "dropout-inactive": Case(lambda q, k, v: F.dropout((q @ kt(k) * C).softmax(-1), 0.1, training=False) @ v),
    "dropout-zero": Case(lambda q, k, v: torch.dropout((q @ kt(k) * C).softmax(-1), 0.0, True) @ v),
    "manual-softmax": Case(lambda q, k, v: manual_softmax(q @ kt(k) * C) @ v),
    "max-subtracted": Case(lambda q, k, v: ((s := q @ kt(k) * C) - s.amax(-1, keepdim=True)).softmax(-1) @ v),
    "vae-block": Case(vae_block, "bnd"),
    "guided-diffusion": Case(guided_diffusion, "bnd"),
    "mbart": Case(mbart, mask="float"),
    "grouped-repeat-interleave": Case(
        lambda q, k, v: (
            (q @ kt(k[:, :2].repeat_interleave(2, dim=1)) * C).softmax(-1) @ v[:, :2].repeat_interleave(2, dim=1)
        )
    ),
    "grouped-expand": Case(
        lambda q, k, v: (
            (q @ kt(k[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(k.shape)) * C).softmax(-1)
            @ v[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(v.shape)
        )
    ),
    "fused": Case(F.scaled_dot_product_attention),
    "fused-scale": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3)),
    "fused-mask": Case(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), mask="float"),
    "fused-bool": Case(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), mask="bool"),
    "fused-causal": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "square"),
    "fused-three-axes": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "bnd"),
    "fused-grouped": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)),
}


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Cross attention (5 rows, 7 keys) unless the case is square; the mask's every domain value occurs."""
    rng = torch.Generator().manual_seed(seed)
    n, m = (6, 6) if case.layout == "square" else (5, 7)

    def draw(rows: int) -> torch.Tensor:
        shape = {"bnd": (3, rows, 8), "bnhd": (2, rows, 4, 8)}.get(case.layout, (2, 4, rows, 8))
        return torch.randn(shape, generator=rng).to(dtype)

    made = [draw(n), draw(m), draw(m)]
    if case.mask == "float":
        made.append(torch.randn(2, 1, n, m, generator=rng).to(dtype))
    elif case.mask == "float-bnd":
        made.append(torch.randn(3, n, m, generator=rng).to(dtype))
    elif case.mask == "bool":
        hidden = torch.rand(2, 1, n, m, generator=rng) > 0.5
        hidden[..., 0], hidden[..., 1] = True, False  # no row without a key, negated or not
        made.append(hidden)
    elif case.mask == "int":
        made.append(torch.randint(0, 4, (2, 1, 1, m), generator=rng).index_fill(3, torch.tensor([0]), 3))
    return tuple(made)
