"""Read a diffusers model directory: ``config.json`` and safetensors, never a pickle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from hasten.errors import HastenError, UsageError

_STEM = "diffusion_pytorch_model"
_WEIGHTS = re.compile(rf"{_STEM}(?:\.safetensors\.index(?:\.(?P<v1>[^.]+))?\.json|(?:\.(?P<v2>[^.]+))?\.safetensors)")


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model directory; it must name its class."""
    if not directory.is_dir():
        raise UsageError(f"no directory {directory}; name a diffusers model directory, one with a config.json")
    path = directory / "config.json"
    if not path.is_file():
        if (directory / "model_index.json").is_file():
            parts = sorted(p.parent.name for p in directory.glob("*/config.json"))
            raise UsageError(
                f"{directory} is a pipeline, not a model; name one of its parts: {', '.join(parts) or 'it has none'}"
            )
        raise UsageError(f"{directory} has no config.json; name a diffusers model directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise UsageError(f"{path} does not name its class (_class_name); it is not a diffusers model's configuration")
    if "quantization_config" in config:
        raise UsageError(
            f"{path} describes quantised weights, which are not read; save the model in float16 or float32"
        )
    return config


def find_variant(directory: Path, variant: str | None) -> str | None:
    """Choose the weights' variant: what was asked for, else the plain files, else the only variant there is."""
    found: set[str | None] = set()
    for file in directory.iterdir():
        if match := _WEIGHTS.fullmatch(file.name):
            found.add(match["v1"] or match["v2"])
    if not found:
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise UsageError(
                f"{directory} has no safetensors; {pickles[0]} is a pickle, and pickles are not loaded. Convert it "
                "where you trust it: load it with diffusers and call save_pretrained(..., safe_serialization=True)"
            )
        raise UsageError(f"{directory} has no weights; {_STEM}.safetensors was looked for")
    if variant is not None:
        if variant not in found:
            names = ", ".join(sorted(v or "(plain)" for v in found))
            raise UsageError(f"{directory} has no variant {variant!r}; there are {names}")
        return variant
    if None in found:
        return None
    if len(found) > 1:
        names = ", ".join(sorted(str(v) for v in found))
        raise UsageError(f"{directory} has the variants {names}; name one with variant=")
    return found.pop()


def load_directory(model_class: Any, directory: Path, variant: str | None = None) -> nn.Module:
    """Load a model, single file or sharded; every key and every shape must fit.

    diffusers itself renames the keys of old checkpoints; what is still missing, unexpected or of another shape is
    refused.
    """
    chosen = find_variant(directory, variant)
    try:
        model, info = model_class.from_pretrained(
            directory,
            use_safetensors=True,
            variant=chosen,
            local_files_only=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise HastenError(f"{directory} could not be read: {error}") from error
    wrong = [
        f"{key} has shape {list(found)}, {list(wanted)} is needed" for key, found, wanted in info["mismatched_keys"]
    ]
    wrong += [f"{key} is missing" for key in info["missing_keys"]]
    wrong += [f"{key} is not a parameter of the model" for key in info["unexpected_keys"]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(f"{directory} does not fit its config.json: {'; '.join(sorted(wrong)[:3])}{more}")
    return model
