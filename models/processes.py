"""What models were trained on, as far as their names tell: `Process.of` reads it; and how they are told the time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
"""Of Stable Diffusion 1.5 and XL (scheduler_config.json of both pipelines)."""
_NAMED: Mapping[str, Mapping[str, Any]] = {
    "sd15-unet": STABLE_DIFFUSION,
    "sdxl-unet": STABLE_DIFFUSION,
    # The linear schedule of improved diffusion, 1000 steps, betas from 0.0001 to 0.02. DiT: huggingface/diffusers,
    # scripts/convert_dit_to_diffusers.py, DDPMScheduler with beta_schedule="linear" and prediction_type="epsilon".
    # PixArt: the same repository's scripts/convert_pixart_alpha_to_diffusers.py, DPMSolverMultistepScheduler() as is;
    # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, scheduler/scheduler_config.json, writes the same values out.
    "dit-xl-2": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"},
    "pixart-alpha": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"},
}


def process_of(name: str) -> Mapping[str, Any] | None:
    """The process of a registered model, in full or reduced form; None where its name does not tell."""
    from hasten.models.registry import BUNDLED

    if name in BUNDLED:
        from hasten.models.scenes.adapters import specification

        known = ("objective", "schedule", "shift")
        return {key: value for key, value in specification(name).items() if key in known}
    return _NAMED.get(name.removesuffix("-reduced"))


def time_scale_of(name: str) -> float:
    """What a scheduler's times are multiplied by for a network: 1 unless its family says otherwise.

    ``name`` is that of a registered model, in full or reduced form, a diffusers directory as a source, or the name of a
    diffusers class.
    """
    from hasten.models import diffusers_dir, registry

    if name and diffusers_dir.is_directory_source(name):
        family = diffusers_dir.family(name)
    else:
        family = registry.family(name) or diffusers_dir.family_of_class(name)
    return 1.0 if family is None else family.time_scale
