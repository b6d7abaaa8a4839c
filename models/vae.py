"""The decoder of Stable Diffusion's autoencoder (Rombach et al., 2112.10752)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, normal


class Decoder(nn.Module):
    """The half of an AutoencoderKL that makes pictures; the encoder's weights are not kept."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.post_quant_conv = autoencoder.post_quant_conv
        self.decoder = autoencoder.decoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, H, W), already divided by the scaling factor, to pictures in [-1, 1]."""
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent)


def _inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    side = config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
    dims = {0: "batch", 2: "height", 3: "width"}
    return (Input("latent", (1, config["latent_channels"], side, side), normal, dims),)


def _wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return Decoder(model)


DECODER = Family("vae-decoder", "AutoencoderKL", _inputs, _wrap, {}, output_names=("image",), batch=1)

ARCHITECTURES = (
    Architecture(
        "sd15-vae-decoder",
        DECODER,
        "Stable Diffusion 1.5 VAE decoder, 512 x 512",
        {
            "sample_size": 512,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
        },
        {"group-norm-act": 30, "group-norm-act.silu": 29, "attention": 1, "upsample-conv": 3},
        reduced={"sample_size": 64, "block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
    ),
)
