"""``path/to/pipeline#unet``: a model in a diffusers pipeline or model directory on disk."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.errors import UsageError, nearest
from hasten.models.diffusers_weights import read_config

if TYPE_CHECKING:
    from hasten.models.adapter import Adapter
    from hasten.models.family import Family

FAMILIES = {
    "UNet2DConditionModel": ("unet", "TEXT"),
    "UNet2DModel": ("unet", "CLASS"),
    "AutoencoderKL": ("vae", "DECODER"),
    "DiTTransformer2DModel": ("dit", "DIT"),
    "PixArtTransformer2DModel": ("pixart", "PIXART"),
    "LatteTransformer3DModel": ("latte", "LATTE"),
    "StableAudioDiTModel": ("stable_audio", "STABLE_AUDIO"),
    "FluxTransformer2DModel": ("flux", "FLUX"),
}
"""The classes that are known, by their name in ``config.json``. Of an AutoencoderKL, the decoder is taken."""


def is_directory_source(source: str) -> bool:
    """Say whether a source means a directory on disk: it has a ``#``, or is a directory with a configuration."""
    path = Path(source.split("#")[0])
    return "#" in source or (path / "config.json").is_file() or (path / "model_index.json").is_file()


def from_source(source: str, *, variant: str | None = None, processor: str = "sdpa") -> Adapter:
    """Describe the model that ``DIRECTORY`` or ``PIPELINE#PART`` holds; its class is that of its ``config.json``.

    Raises `UsageError` for a missing directory or part, an unknown class, and weights that are not safetensors.
    """
    root, _, part = source.partition("#")
    directory = _directory(source)
    if part and Path(root).is_dir() and not directory.is_dir():
        parts = sorted(p.parent.name for p in Path(root).glob("*/config.json"))
        raise UsageError(f"{root} has no part {part!r}; it has {', '.join(parts) or 'none'}.{nearest(part, parts)}")
    class_name = read_config(directory)["_class_name"]
    if (known := family_of_class(class_name)) is None:
        raise UsageError(
            f"{directory} holds a {class_name}, which is not known; known are {', '.join(FAMILIES)}."
            f"{nearest(class_name, FAMILIES)}"
        )
    return known.from_directory(directory, name=source, variant=variant, processor=processor)


def family(source: str) -> Family | None:
    """The family of the model that a directory holds; None where its class is not known."""
    return family_of_class(read_config(_directory(source))["_class_name"])


def family_of_class(class_name: str) -> Family | None:
    """The family of a diffusers class; None where it is not known."""
    if class_name not in FAMILIES:
        return None
    module, name = FAMILIES[class_name]
    found: Family = getattr(import_module(f"hasten.models.{module}"), name)
    return found


def _directory(source: str) -> Path:
    root, _, part = source.partition("#")
    return Path(root, part) if part else Path(root)
