"""A work as a module and its inputs, the same ones in every process: what a worker's implementation is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.tools.bench_works import is_layer, parse_layer

if TYPE_CHECKING:
    import torch

    from hasten.models.adapter import Adapter


@dataclass(frozen=True)
class Subject:
    """``word`` is a `bench_works.Work`'s. The seed is of a layer's weights and of every input.

    Nothing heavy is imported before `module`, `inputs` or `adapter` is called, so that a runtime which needs no torch
    is measured without it.
    """

    word: str
    weights: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def adapter(self) -> Adapter | None:
        """The named model with the sizes asked for; None for a layer."""
        if is_layer(self.word):
            return None
        from hasten.backends.shapes import parse_profiles
        from hasten.tools.sizes import sized
        from hasten.tools.source import MODEL, resolve

        name, _, shapes = self.word.partition("@")
        weights = None if self.weights is None else Path(self.weights)
        adapter = resolve(name, kinds=(MODEL,), weights=weights).adapter()
        return sized(adapter, parse_profiles(shapes))[0] if shapes else adapter

    def module(self) -> torch.nn.Module:
        """Build the module: evaluation mode, no gradients, on the device."""
        torch = self._torch()
        torch.manual_seed(self.seed)
        adapter = self.adapter()
        made = _layer(self.word) if adapter is None else adapter.module()
        return made.to(self.device, getattr(torch, self.dtype)).eval().requires_grad_(False)

    def inputs(self) -> dict[str, torch.Tensor]:
        """By name, in the order of the forward's parameters."""
        torch = self._torch()
        dtype = getattr(torch, self.dtype)
        adapter = self.adapter()
        if adapter is not None:
            made = adapter.example_inputs(seed=self.seed, dtype=dtype)
        else:
            drawn = torch.randn(_shape(self.word), generator=torch.Generator().manual_seed(self.seed))
            made = {"input": drawn.to(dtype)}
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def _torch(self) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        return torch


def _shape(word: str) -> tuple[int, ...]:
    _, sizes = parse_layer(word)
    if "tokens" in sizes:
        return sizes["batch"], sizes["tokens"], sizes["channels"]
    return sizes["batch"], sizes["channels"], sizes["height"], sizes["width"]


def _layer(word: str) -> torch.nn.Module:
    """As the diffusion models have them: 3x3 convolutions with padding, nearest upsampling, epsilon 1e-6."""
    from torch import nn

    name, sizes = parse_layer(word)
    if name == "group-norm-silu":
        return nn.Sequential(nn.GroupNorm(sizes["groups"], sizes["channels"], eps=1e-6), nn.SiLU())
    if name == "geglu":

        class Geglu(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(sizes["channels"], 2 * sizes["outputs"])

            def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (as nn.Sequential calls it)
                value, gate = self.proj(input).chunk(2, dim=-1)
                return value * nn.functional.gelu(gate)

        return Geglu()
    conv = nn.Conv2d(sizes["channels"], sizes["outputs"], 3, padding=1)
    return conv if name == "conv" else nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv)
