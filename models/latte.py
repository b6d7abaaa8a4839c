"""Latte, a text-to-video transformer with alternating spatial and temporal blocks (Ma et al., 2401.03048)."""

from __future__ import annotations

import torch
from torch import nn

from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, normal, uniform


class VideoTransformer(nn.Module):
    """A transformer over frames, conditioned on prompt tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Denoise (B, C, F, H, W) at times (B,) under prompts (B, T, D)."""
        return self.model(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]


def _inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    side, batch = config["sample_size"], {0: "batch"}
    return (
        Input("hidden_states", (2, config["in_channels"], config["video_length"], side, side), normal, batch),
        Input("timestep", (2,), uniform(1, 999), batch, wide=True),
        Input(
            "encoder_hidden_states",
            (2, sizes["text"], config["caption_channels"]),
            normal,
            {0: "batch", 1: "text"},
        ),
    )


def _wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return VideoTransformer(model)


LATTE = Family("latte", "LatteTransformer3DModel", _inputs, _wrap, {"text": 120})

ARCHITECTURES = (
    Architecture(
        "latte",
        LATTE,
        "Latte-1 text-to-video transformer, 16 frames of 512 x 512",
        {
            "sample_size": 64,
            "video_length": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        {"attention": 84},
        reduced={
            "sample_size": 8,
            "video_length": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 48,
        },
        reduced_sizes={"text": 12},
    ),
)
