"""Latte with a spatial and the temporal block behind it as one block, for caches that know only rows of blocks.

Latte's forward takes spatial and temporal blocks in turns from two lists. Hooks that take all of one list before the
other, or replace a list by what runs it as a whole, do not fit it; pairs of blocks in one list do, and compute the
same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Pair(nn.Module):
    """A spatial block, then a temporal one; called as Latte calls its spatial blocks."""

    def __init__(self, spatial: nn.Module, temporal: nn.Module, frames: int, position: torch.Tensor | None) -> None:
        super().__init__()
        self.spatial, self.temporal, self.frames, self.position = spatial, temporal, frames, position

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert timestep is not None
        x = self.spatial(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep)
        patches = x.shape[1]
        x = x.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(0, 1)
        if self.position is not None:
            x = x + self.position
        x = self.temporal(x, timestep=timestep[:: self.frames].repeat_interleave(patches, dim=0))
        return x.unflatten(0, (-1, patches)).transpose(1, 2).flatten(0, 1)


def paired(model: nn.Module, frames: int) -> nn.Module:
    """Change ``model`` in place; it is to be called with ``enable_temporal_attentions=False``."""
    temporal = model.temporal_transformer_blocks
    pairs = [
        Pair(a, b, frames, model.temp_pos_embed if i == 0 else None)
        for i, (a, b) in enumerate(zip(model.transformer_blocks, temporal, strict=True))
    ]
    model.transformer_blocks = nn.ModuleList(pairs)
    del model.temporal_transformer_blocks
    model.temporal_transformer_blocks = pairs  # a plain list: only its length is read
    return model
