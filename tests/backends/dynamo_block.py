"""A network with a site of most rules, to be compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """GroupNorm, SiLU, convolution, attention, GEGLU: (B, 16, S, S) -> (B, 16, S, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.qkv = nn.Linear(16, 48)
        self.gate = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(F.silu(self.norm(x)))
        tokens = hidden.flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        value, gate = self.gate(tokens).chunk(2, -1)
        return (value * F.gelu(gate)).transpose(1, 2).reshape(x.shape)


BLOCK_HITS = {"geglu": 1, "attention": 1, "group-norm-act": 1, "native-attention": 1}
OTHER_TYPES_HITS = {"geglu": 1, "attention": 1, "group-norm-act": 1}
"""The C++ kernel of attention is for float32."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X = draw(2, 16, 8, 8)


def spelled_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))
