"""FLUX.1, a rectified-flow transformer with double- and single-stream blocks (Black Forest Labs, 2024)."""

from __future__ import annotations

import torch
from torch import nn

from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, fixed, normal, uniform


class FlowTransformer(nn.Module):
    """A transformer without a guidance input (FLUX.1-schnell)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity of packed latents (B, N, C) at times (B,) in [0, 1]; positions are (N, 3) and (T, 3)."""
        return self.model(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            return_dict=False,
        )[0]


class GuidedFlowTransformer(nn.Module):
    """A guidance-distilled transformer (FLUX.1-dev): the guidance scale is an input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        """As `FlowTransformer`, with guidance scales (B,)."""
        return self.model(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            guidance,
            return_dict=False,
        )[0]


def image_positions(side: int) -> torch.Tensor:
    """Return (0, row, column) of a square of packed latents, (side^2, 3) float32."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()


def _inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    side, text, batch = sizes["side"], sizes["text"], {0: "batch"}
    inputs: tuple[Input, ...] = (
        Input("hidden_states", (1, side * side, config["in_channels"]), normal, {0: "batch", 1: "tokens"}),
        Input("encoder_hidden_states", (1, text, config["joint_attention_dim"]), normal, {0: "batch", 1: "text"}),
        Input("pooled_projections", (1, config["pooled_projection_dim"]), normal, batch),
        Input("timestep", (1,), uniform(0.02, 0.98), batch, wide=True),
        Input("img_ids", (side * side, 3), fixed(lambda: image_positions(side)), {0: "tokens"}, wide=True),
        Input("txt_ids", (text, 3), fixed(lambda: torch.zeros(text, 3)), {0: "text"}, wide=True),
    )
    if config.get("guidance_embeds"):
        inputs += (Input("guidance", (1,), uniform(1, 7), batch, wide=True),)
    return inputs


def _wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return GuidedFlowTransformer(model) if config.get("guidance_embeds") else FlowTransformer(model)


FLUX = Family(
    "flux",
    "FluxTransformer2DModel",
    _inputs,
    _wrap,
    {"side": 64, "text": 512},
    processors=False,
    batch=1,
    time_scale=0.001,  # pipelines/flux/pipeline_flux.py of diffusers: timestep / 1000
)

ARCHITECTURES = (
    Architecture(
        "flux-dev",
        FLUX,
        "FLUX.1-dev transformer, 1024 x 1024",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        {"attention": 57},
        reduced={
            "in_channels": 16,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 14, 14),
        },
        reduced_sizes={"side": 8, "text": 16},
    ),
)
