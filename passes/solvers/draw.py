"""Unit noise as diffusers draws it: of one generator for all pictures, or of one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from hasten.errors import UsageError

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"


def unit_noise(
    shape: Sequence[int], generator: Generators, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw (B, ...) on the generator's own device, or on ``device`` without one, and bring it to ``device``.

    Of B generators each draws its own picture, so that this does not depend on the others; `UsageError` for another
    number of them.
    """
    if generator is None or isinstance(generator, torch.Generator):
        place = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=place, dtype=dtype).to(device)
    if len(generator) == 1:
        return unit_noise(shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise UsageError(f"{len(generator)} generators were given for {shape[0]} pictures; give one, or one each")
    return torch.stack([unit_noise(shape[1:], one, device, dtype) for one in generator])
