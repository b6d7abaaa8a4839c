"""The UNets of Stable Diffusion (Rombach et al., 2112.10752; XL: Podell et al., 2307.01952) and DDPM (2006.11239)."""

from __future__ import annotations

import torch
from torch import nn

from hasten.errors import UsageError
from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, labels, normal, uniform

MAP = {0: "batch", 2: "height", 3: "width"}


class TextUNet(nn.Module):
    """A UNet conditioned on prompt tokens; the prediction has the sample's shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Denoise (B, C, H, W) at times (B,) under prompts (B, T, D)."""
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class TextSizeUNet(nn.Module):
    """A UNet conditioned on prompt tokens, a pooled prompt and the picture's sizes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Denoise (B, C, H, W) at times (B,) under prompts (B, T, D), pooled ones (B, P) and six sizes (B, 6)."""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class ClassUNet(nn.Module):
    """A UNet conditioned on a class number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Denoise (B, C, H, W) at times (B,) under classes (B,)."""
        return self.model(sample, timestep, class_labels, return_dict=False)[0]


class PlainUNet(nn.Module):
    """A UNet without a condition."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Denoise (B, C, H, W) at times (B,)."""
        return self.model(sample, timestep, return_dict=False)[0]


def _map_and_time(config: Config, sizes: Sizes) -> tuple[Input, Input]:
    side = config["sample_size"] or sizes["map"]
    height, width = (side, side) if isinstance(side, int) else side
    return (
        Input("sample", (2, config["in_channels"], height, width), normal, MAP),
        Input("timestep", (2,), uniform(1, 999), {0: "batch"}, wide=True),
    )


def _levels(config: Config) -> Sizes:
    """Every level but the last halves the map."""
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    return {"height": multiple, "width": multiple}


def _text_inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if config.get(key) is not None:
            raise UsageError(
                f"a UNet2DConditionModel with {key}={config[key]!r} is not supported; only prompts, and SDXL's sizes"
            )
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise UsageError(
            f"a UNet2DConditionModel with addition_embed_type={added!r} is not supported; only 'text_time' is"
        )
    tokens = (2, sizes["text"], config["cross_attention_dim"])
    inputs: tuple[Input, ...] = (
        *_map_and_time(config, sizes),
        Input("encoder_hidden_states", tokens, normal, {0: "batch", 1: "text"}),
    )
    if added == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs += (
            Input("text_embeds", (2, pooled), normal, {0: "batch"}),
            Input("time_ids", (2, 6), uniform(0, 1024), {0: "batch"}, wide=True),
        )
    return inputs


def _text_wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return TextSizeUNet(model) if config.get("addition_embed_type") == "text_time" else TextUNet(model)


def _class_inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    if config.get("class_embed_type") is not None:
        raise UsageError(f"a UNet2DModel with class_embed_type={config['class_embed_type']!r} is not supported")
    inputs: tuple[Input, ...] = _map_and_time(config, sizes)
    if count := config.get("num_class_embeds"):
        inputs += (Input("class_labels", (2,), labels(count), {0: "batch"}),)
    return inputs


def _class_wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return ClassUNet(model) if config.get("num_class_embeds") else PlainUNet(model)


TEXT = Family("unet", "UNet2DConditionModel", _text_inputs, _text_wrap, {"map": 64, "text": 77}, multiples=_levels)
CLASS = Family("class-unet", "UNet2DModel", _class_inputs, _class_wrap, {"map": 32}, multiples=_levels)

ARCHITECTURES = (
    Architecture(
        "sd15-unet",
        TEXT,
        "Stable Diffusion 1.5 UNet, 512 x 512",
        {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
        },
        {"group-norm-act": 61, "group-norm-act.silu": 45, "attention": 32, "geglu": 16, "upsample-conv": 3},
        reduced={
            "sample_size": 16,
            "block_out_channels": (32, 64, 128, 128),
            "cross_attention_dim": 64,
            "norm_num_groups": 16,
        },
    ),
    Architecture(
        "sdxl-unet",
        TEXT,
        "Stable Diffusion XL UNet, 1024 x 1024",
        {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "norm_num_groups": 32,
        },
        {"group-norm-act": 46, "group-norm-act.silu": 35, "attention": 140, "geglu": 70, "upsample-conv": 2},
        reduced={
            "sample_size": 16,
            "block_out_channels": (32, 64, 128),
            "attention_head_dim": (2, 4, 8),
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 256,
            "norm_num_groups": 16,
        },
    ),
)
