"""The named tensor inputs of a model, and how example values for them are drawn.

Values depend on the seed and on the input's name alone, so that an input keeps its values when another one is added.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Draw = Callable[[torch.Generator, tuple[int, ...], int], torch.Tensor]
"""From a generator, a shape and the seed to values."""


@dataclass(frozen=True)
class Input:
    """One tensor argument of a forward.

    ``dims`` names the axes whose size may change, by axis. ``wide`` inputs (times, sizes) stay float32 in a
    half-precision model, which casts them where it can: 981 is not a bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    draw: Draw
    dims: Mapping[int, str] = field(default_factory=dict)
    wide: bool = False

    def example(self, batch: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """Draw example values with ``batch`` on the axis named so; floating ones in ``dtype`` unless wide."""
        shape = tuple(batch if self.dims.get(axis) == "batch" else size for axis, size in enumerate(self.shape))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}:{seed}".encode()))
        value = self.draw(generator, shape, seed)
        return value.to(dtype) if value.is_floating_point() and not self.wide else value


def normal(generator: torch.Generator, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw unit normal values."""
    return torch.randn(shape, generator=generator)


def uniform(low: float, high: float) -> Draw:
    """Draw evenly between ``low`` and ``high``."""

    def draw(generator: torch.Generator, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    return draw


def labels(count: int) -> Draw:
    """Draw class numbers below ``count``, other ones for every sample and for consecutive seeds."""

    def draw(generator: torch.Generator, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        return (torch.arange(shape[0]) * 5 + seed * 3 + 1) % count

    return draw


def prompt_mask(generator: torch.Generator, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Mark a different number of leading tokens, at least half of them, for every sample; True = may be attended to."""
    samples, tokens = shape
    length = tokens // 2 + (torch.arange(samples) * 7 + seed * 5 + 3) % (tokens - tokens // 2)
    return torch.arange(tokens) < length[:, None]


def fixed(value: Callable[[], torch.Tensor]) -> Draw:
    """Take ``value()``, whatever the seed: position numbers, not data."""

    def draw(generator: torch.Generator, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        return value()

    return draw
