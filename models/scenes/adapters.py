"""`scenes-unet`, `scenes-dit` and `scenes-video`: the bundled models, with trained weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hasten.errors import UsageError
from hasten.models.adapter import Adapter
from hasten.models.dit import DIT
from hasten.models.family import Family
from hasten.models.latte import LATTE
from hasten.models.scenes import weights
from hasten.models.unet import CLASS

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Bundled:
    """A trained model: its family, and the stem of its configuration and weights in this folder.

    ``sizes`` are what the configuration does not say and the family would get wrong.
    """

    stem: str
    family: Family
    description: str
    expected: dict[str, int]
    sizes: Mapping[str, int] = field(default_factory=dict)


MODELS = {
    "scenes-unet": Bundled(
        "unet",
        CLASS,
        "class-conditional UNet of 32 x 32 scenes, v-prediction",
        {"group-norm-act": 21, "group-norm-act.silu": 17, "attention": 4, "upsample-conv": 1},
    ),
    "scenes-dit": Bundled(
        "dit", DIT, "class-conditional transformer of 32 x 32 scenes, rectified flow", {"attention": 6}
    ),
    "scenes-video": Bundled(
        "video",
        LATTE,
        "video transformer of 8 frames of 32 x 32 scenes, told shape, colour and speed, rectified flow",
        {"attention": 18},
        {"text": 3},
    ),
}


def specification(name: str) -> dict[str, Any]:
    """Read a bundled model's class, configuration, objective, schedule and pixel-unshuffle factor."""
    return json.loads((FOLDER / f"{MODELS[name].stem}.json").read_text())


def adapter(name: str, *, reduced: bool = False, processor: str = "sdpa") -> Adapter:
    """Describe a bundled model; its weights are read when the module is built."""
    if reduced:
        raise UsageError(f"{name} is small already; there is no reduced form of it")
    model, spec = MODELS[name], specification(name)
    return model.family.describe(
        name=name,
        description=model.description,
        config=spec["config"],
        sizes={**model.family.sizes, **model.sizes},
        expected=model.expected,
        trained=True,
        processor=processor,
        make=lambda _: load(name),
    )


def load(name: str) -> nn.Module:
    """Build the diffusers model with its bundled weights (the mean of the training, float16) in float32."""
    model = MODELS[name]
    tensors = weights.read(FOLDER / f"{model.stem}.safetensors", name, f"hasten.models.scenes.train {model.stem}")
    module = model.family.model_class()(**specification(name)["config"])
    module.load_state_dict(tensors)
    return module
