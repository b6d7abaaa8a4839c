"""PixArt-alpha, a text-conditional diffusion transformer (Chen et al., 2310.00426)."""

from __future__ import annotations

import torch
from torch import nn

from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, normal, prompt_mask, uniform


class TextTransformer(nn.Module):
    """A transformer conditioned on prompt tokens, of which some are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Denoise (B, C, H, W) under prompts (B, T, D) with mask (B, T), True = may be attended to, at times (B,)."""
        return self.model(
            hidden_states,
            encoder_hidden_states,
            timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]


class TextSizeTransformer(nn.Module):
    """The same, conditioned on the picture's size and aspect ratio as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        resolution: torch.Tensor,
        aspect_ratio: torch.Tensor,
    ) -> torch.Tensor:
        """As `TextTransformer`, with resolution (B, 2) in pixels and aspect ratio (B, 1)."""
        return self.model(
            hidden_states,
            encoder_hidden_states,
            timestep,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]


def _sized(config: Config) -> bool:
    """Mirror the class: a model of 128 x 128 latents has the conditions unless its configuration says otherwise."""
    told = config.get("use_additional_conditions")
    return bool(config["sample_size"] == 128 if told is None else told)


def _inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    side, batch, text = config["sample_size"], {0: "batch"}, sizes["text"]
    width = config.get("caption_channels") or config["cross_attention_dim"]
    inputs: tuple[Input, ...] = (
        Input("hidden_states", (2, config["in_channels"], side, side), normal, batch),
        Input("encoder_hidden_states", (2, text, width), normal, {0: "batch", 1: "text"}),
        Input("timestep", (2,), uniform(1, 999), batch, wide=True),
        Input("encoder_attention_mask", (2, text), prompt_mask, {0: "batch", 1: "text"}),
    )
    if _sized(config):
        inputs += (
            Input("resolution", (2, 2), uniform(256, 1024), batch, wide=True),
            Input("aspect_ratio", (2, 1), uniform(0.25, 4), batch, wide=True),
        )
    return inputs


def _wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return TextSizeTransformer(model) if _sized(config) else TextTransformer(model)


PIXART = Family("pixart", "PixArtTransformer2DModel", _inputs, _wrap, {"text": 120})

ARCHITECTURES = (
    Architecture(
        "pixart-alpha",
        PIXART,
        "PixArt-alpha XL/2, 1024 x 1024",
        {
            "sample_size": 128,
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
            "use_additional_conditions": True,
        },
        {"attention": 56},
        # The size embeddings are a third of the width each, in whole numbers.
        reduced={
            "sample_size": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "cross_attention_dim": 96,
            "caption_channels": 48,
        },
        reduced_sizes={"text": 20},
    ),
)
