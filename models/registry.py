"""The model names, and `get`: a name to an `Adapter`.

Names need neither torch nor diffusers; a family's file is imported when one of its models is asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    from hasten.models.adapter import Adapter
    from hasten.models.family import Architecture, Family

BUNDLED = ("scenes-unet", "scenes-dit", "scenes-video")
"""Small, trained, and shipped with the package."""

_HOMES = {
    "sd15-unet": "unet",
    "sd15-vae-decoder": "vae",
    "sdxl-unet": "unet",
    "dit-xl-2": "dit",
    "pixart-alpha": "pixart",
    "latte": "latte",
    "stable-audio-dit": "stable_audio",
    "flux-dev": "flux",
}
_REDUCED = "-reduced"


def names() -> tuple[str, ...]:
    """Return every name that `get` takes: bundled models, real architectures, and the reduced forms of those."""
    return (*BUNDLED, *_HOMES, *(name + _REDUCED for name in _HOMES))


def get(
    name: str,
    *,
    reduced: bool = False,
    weights: str | Path | None = None,
    variant: str | None = None,
    processor: str = "sdpa",
) -> Adapter:
    """Describe a model by name; nothing is built before `Adapter.module`.

    A real architecture has random weights from a fixed seed, unless ``weights`` names a diffusers model directory of
    the same class; then that directory's configuration holds, and ``variant`` chooses among its files ("fp16").
    ``reduced`` (or the name with ``-reduced``) keeps every block and narrows it. ``processor`` spells the attention
    as diffusers' AttnProcessor2_0 ("sdpa") or AttnProcessor ("classic").

    Raises `UsageError` for an unknown name or option, `MissingPackageError` where diffusers is needed and not
    installed.
    """
    base = name.removesuffix(_REDUCED)
    reduced = reduced or base != name
    if base not in _HOMES and base not in BUNDLED:
        raise UsageError(f"unknown model {name!r}; `hasten models` lists the names.{nearest(name, names())}")
    if variant is not None and weights is None:
        raise UsageError(f"{name}: variant={variant!r} chooses among the files of weights=; name a directory")
    if reduced and weights is not None:
        raise UsageError(f"{name}: weights come with their own sizes; ask for {base} without reduced")
    if base in BUNDLED:
        scenes = import_module("hasten.models.scenes.adapters")
        if weights is not None:
            raise UsageError(
                f"{name} has bundled weights and takes no others; name the directory {weights} itself as the source"
            )
        return scenes.adapter(base, reduced=reduced, processor=processor)
    architecture = _architecture(base)
    if weights is not None:
        return architecture.family.from_directory(Path(weights), name=name, processor=processor, variant=variant)
    return architecture.family.from_architecture(architecture, reduced=reduced, processor=processor)


def family(name: str) -> Family | None:
    """The family of a real architecture; None for a bundled model, and for what is no registered name."""
    base = name.removesuffix(_REDUCED)
    return _architecture(base).family if base in _HOMES else None


def _architecture(base: str) -> Architecture:
    module = import_module(f"hasten.models.{_HOMES[base]}")
    found: Architecture = next(a for a in module.ARCHITECTURES if a.name == base)
    return found
