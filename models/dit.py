"""DiT, the class-conditional diffusion transformer (Peebles & Xie, 2212.09748)."""

from __future__ import annotations

import torch
from torch import nn

from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, labels, normal, uniform


class ClassTransformer(nn.Module):
    """A transformer conditioned on a class number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Denoise (B, C, H, W) at times (B,) under classes (B,)."""
        return self.model(hidden_states, timestep, class_labels, return_dict=False)[0]


def _inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    side, batch = config["sample_size"], {0: "batch"}
    return (
        Input("hidden_states", (2, config["in_channels"], side, side), normal, batch),
        Input("timestep", (2,), uniform(1, 999), batch, wide=True),
        Input("class_labels", (2,), labels(config["num_embeds_ada_norm"]), batch),
    )


def _wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return ClassTransformer(model)


DIT = Family("dit", "DiTTransformer2DModel", _inputs, _wrap, {})

ARCHITECTURES = (
    Architecture(
        "dit-xl-2",
        DIT,
        "DiT-XL/2, 256 x 256",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
        {"attention": 28},
        reduced={"sample_size": 8, "num_attention_heads": 4, "attention_head_dim": 16, "num_embeds_ada_norm": 16},
    ),
)
