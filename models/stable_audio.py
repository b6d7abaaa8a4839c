"""Stable Audio Open's diffusion transformer (Evans et al., 2407.14358): 1-D, rotary, grouped-query cross-attention."""

from __future__ import annotations

import torch
from torch import nn

from hasten.models.family import Architecture, Config, Family, Sizes
from hasten.models.inputs import Input, normal, uniform


def rotary_table(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of 1-D rotary positions (Su et al., 2104.09864), (length, width) each."""
    frequency = 10_000 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


class AudioTransformer(nn.Module):
    """A transformer over a waveform's latents; the length is fixed, so the rotary table is a constant."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: nn.Module, length: int, head_dim: int) -> None:
        super().__init__()
        self.model = model
        # Half of a head rotates, and one global token stands before the sequence.
        cos, sin = rotary_table(length + 1, head_dim // 2)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        global_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Denoise (B, C, L) at times (B,) in (0, 1) under prompts (B, T, D) and global states (B, 1, G)."""
        return self.model(
            hidden_states,
            timestep,
            encoder_hidden_states,
            global_hidden_states,
            (self.cos, self.sin),
            return_dict=False,
        )[0]


def _inputs(config: Config, sizes: Sizes) -> tuple[Input, ...]:
    batch = {0: "batch"}
    return (
        Input("hidden_states", (2, config["in_channels"], config["sample_size"]), normal, batch),
        Input("timestep", (2,), uniform(0.02, 0.98), batch, wide=True),
        Input(
            "encoder_hidden_states",
            (2, sizes["text"], config["cross_attention_input_dim"]),
            normal,
            {0: "batch", 1: "text"},
        ),
        Input("global_hidden_states", (2, 1, config["global_states_input_dim"]), normal, batch),
    )


def _wrap(model: nn.Module, config: Config, sizes: Sizes) -> nn.Module:
    return AudioTransformer(model, config["sample_size"], config["attention_head_dim"])


STABLE_AUDIO = Family("stable-audio", "StableAudioDiTModel", _inputs, _wrap, {"text": 130}, processors=False)

ARCHITECTURES = (
    Architecture(
        "stable-audio-dit",
        STABLE_AUDIO,
        "Stable Audio Open 1.0 diffusion transformer, 47 seconds",
        {
            "sample_size": 1024,
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "num_key_value_attention_heads": 12,
            "cross_attention_dim": 768,
            "time_proj_dim": 256,
            "global_states_input_dim": 1536,
            "cross_attention_input_dim": 768,
        },
        {"attention": 48},
        reduced={
            "sample_size": 32,
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 32,
            "time_proj_dim": 32,
            "global_states_input_dim": 48,
            "cross_attention_input_dim": 32,
        },
        reduced_sizes={"text": 10},
    ),
)
