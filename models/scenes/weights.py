"""Weights of the small networks of ``scenes``: one safetensors file each, kept in float16 and used in float32."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from hasten.errors import HastenError


def read(path: Path, owner: str, training: str) -> dict[str, torch.Tensor]:
    """Read floating tensors as float32. `HastenError` where ``owner`` has no file, with the module that makes it."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise HastenError(f"{owner} has no weights: {path} is missing; train it with `python -m {training}`")
    return {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}


def halved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating tensors as float16."""
    return {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}


def write(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write tensors as they are, whole or not at all."""
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    save_file({name: t.contiguous() for name, t in tensors.items()}, part)
    os.replace(part, path)
    return path
