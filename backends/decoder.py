"""The decoder behind a sampler: what makes pixels of the last latents, as a program of its own in the sampler's engine.

It stands beside the loop and not behind it in one graph: it runs once where the loop is called in chunks, previews can
go through it as well, and in straight-line code every target has fused attention, which TensorRT-RTX lacks in branches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.backends.manifest import Manifest
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.backends.source import Origin

NAME = "decoder"
OWN = "own"
"""What asks for the decoder of a bundled model itself."""
LATENTS, PIXELS = "latents", "pixels"


class Decoder(NamedTuple):
    """``module(latents / scaling_factor + shift_factor)`` are pixels, (B, 3, H, W) or whatever the module makes.

    Latents come in the module's own type, and pixels go out as float32; with ``unit``, from [-1, 1] to [0, 1] and kept
    there. The factors are those of a diffusers AutoencoderKL (``scaling_factor``, ``shift_factor``).
    """

    module: Any
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    unit: bool = False


def decoder_of(source: Any, model: str = "", *, unit: bool = False) -> Decoder:
    """Make a `Decoder`: of a diffusers AutoencoderKL, its directory, a registered decoder, or ``own`` of ``model``.

    ``model`` is a bundled model, whose pixels are its latents in another order. Raises `UsageError` for anything else,
    and for an autoencoder that normalises latents channel by channel.
    """
    if isinstance(source, str) and source == OWN:
        return Decoder(_own(model), unit=unit)
    if isinstance(source, (str, os.PathLike)):
        return _named(os.fspath(source), unit)
    if type(source).__name__ != "AutoencoderKL":
        raise UsageError(
            f"decoder: a diffusers AutoencoderKL, its directory or the name of a decoder is wanted, and this is a "
            f"{type(source).__name__}; give Decoder(module) for any other"
        )
    from hasten.models.vae import Decoder as Half

    return Decoder(Half(source).eval(), *_factors(source.config), unit)


def _named(text: str, unit: bool) -> Decoder:
    from pathlib import Path

    from hasten.models import registry
    from hasten.models.diffusers_dir import from_source, is_directory_source
    from hasten.models.diffusers_weights import read_config

    on_disk = is_directory_source(text)
    adapter = from_source(text) if on_disk else registry.get(text)
    if adapter.family != "vae-decoder":
        raise UsageError(
            f"decoder {text!r} is a {adapter.family}; give a diffusers AutoencoderKL's directory, a registered decoder "
            f"such as sd15-vae-decoder, or {OWN!r} for a bundled model's"
        )
    root, _, part = text.partition("#")
    config = read_config(Path(root, part)) if on_disk else {}
    return Decoder(adapter.module(), *_factors(config), unit)


def _factors(config: Mapping[str, Any]) -> tuple[float, float]:
    """``scaling_factor`` and ``shift_factor``, as diffusers sets them where they are missing."""
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UsageError(
            "decoder: this autoencoder normalises latents channel by channel (latents_mean, latents_std), and one "
            "factor is applied here; give Decoder(module) with a module that undoes it"
        )
    shift = config.get("shift_factor")
    return float(config.get("scaling_factor", 0.18215)), 0.0 if shift is None else float(shift)


def _own(model: str) -> Any:
    from hasten.models.registry import BUNDLED

    if model not in BUNDLED:
        raise UsageError(
            f"decoder {OWN!r} is that of a bundled model ({', '.join(BUNDLED)}), and this is {model or 'none'}; give "
            "the directory of a diffusers AutoencoderKL"
        )
    from hasten.models.scenes.adapters import specification
    from hasten.models.scenes.subject import Pixels

    return Pixels(specification(model)).eval()


def origin(decoder: Decoder, sizes: Sequence[int], device: str) -> Origin:
    """The decoder as a source to build, on latents of ``sizes`` (B, ...)."""
    import torch
    from torch import nn

    from hasten.backends.source import Origin

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = decoder.module
            held = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
            self.dtype = held

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            scaled = latents if decoder.scaling_factor == 1 else latents / decoder.scaling_factor
            moved = scaled if decoder.shift_factor == 0 else scaled + decoder.shift_factor
            made = self.module(moved.to(self.dtype))
            pixels: torch.Tensor = (made if isinstance(made, torch.Tensor) else made[0]).float()
            return (pixels * 0.5 + 0.5).clamp(0, 1) if decoder.unit else pixels

    example = torch.randn(tuple(sizes), generator=torch.Generator().manual_seed(0)).to(device)
    return Origin(Decoding().to(device).eval(), (), {LATENTS: example}, None, NAME, (PIXELS,))


def joined(manifest: Manifest, part: Manifest, decoder: Decoder) -> Manifest:
    """The manifest of a sampler's engine with the decoder in it, whose own is ``part``."""
    assert manifest.loop is not None
    described = {
        **part.as_program(),
        "scaling_factor": decoder.scaling_factor,
        "shift_factor": decoder.shift_factor,
        "unit": decoder.unit,
    }
    hits = ", ".join(f"{rule['name']} {rule['hits']}" for rule in part.report["rules"] if rule["hits"])
    report = {**manifest.report, "notes": [*manifest.report["notes"], f"decoder: {hits or 'nothing'} rewritten"]}
    return replace(manifest, loop={**manifest.loop, NAME: described}, report=report)


def part_of(manifest: Manifest) -> Manifest | None:
    """The decoder in a sampler's engine as an engine's manifest of its own; None where there is none."""
    if manifest.loop is None or manifest.loop.get(NAME) is None:
        return None
    return replace(manifest.program(manifest.loop[NAME]), state=(), loop=None)
