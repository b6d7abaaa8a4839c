"""`Adapter`: what the compiler must be told about a model, and how to get the module and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hasten.errors import UsageError
from hasten.models.inputs import Input

LARGEST_BATCH = 63
"""diffusers' upsampling takes another path from 64 samples on, so one graph ends there."""


@dataclass(frozen=True)
class Adapter:
    """One model: its forward's inputs and outputs, what the rules must find in it, and a builder.

    ``expected`` maps a rule, or ``rule.variant``, to the number of sites that the architecture has. ``multiples``
    says which symbolic sizes must be a multiple of something. ``trained`` is whether the weights come from training.
    """

    name: str
    family: str
    description: str
    trained: bool
    inputs: tuple[Input, ...]
    output_names: tuple[str, ...]
    expected: Mapping[str, int]
    build: Callable[[torch.dtype], nn.Module] = field(repr=False, compare=False)
    skeleton: Callable[[], nn.Module] = field(repr=False, compare=False)
    batch: int = 2
    multiples: Mapping[str, int] = field(default_factory=dict)

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the model: evaluation mode, weights and buffers in ``dtype``, no gradients.

        Named tensors in, one tensor or a tuple of tensors out. Every call builds a new one, with the same weights.
        """
        return self.build(dtype).to(dtype).eval().requires_grad_(False)

    def example_inputs(
        self, batch: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Return one value for each input, in the order of the forward's parameters.

        Another seed changes every input that is data (position numbers stay). ``dtype`` is that of the floating
        inputs, except for times and sizes, which stay float32.
        """
        if batch is not None and batch < 1:
            raise UsageError(f"{self.name}: example inputs of batch {batch} were asked for; give at least 1")
        return {i.name: i.example(batch or self.batch, seed, dtype) for i in self.inputs}

    @property
    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        """Input name -> {axis: symbolic name}, for the axes whose size may change; equal names are equal sizes."""
        return {i.name: dict(i.dims) for i in self.inputs if i.dims}

    def dynamic_shapes(self, *names: str, limit: int = 4096) -> dict[str, dict[int, Any] | None]:
        """Spell `dynamic_dims` for ``torch.export.export(..., kwargs=example_inputs)``.

        ``names`` are the symbolic sizes that shall be dynamic, all where none is given; a size that must be a
        multiple is spelled as one. Example inputs need a size above 1 on a dynamic axis.
        """
        known = {n for dims in self.dynamic_dims.values() for n in dims.values()}
        for name in names:
            if name not in known:
                raise UsageError(
                    f"{self.name} has no dynamic size {name!r}; there are {', '.join(sorted(known)) or 'none'}"
                )
        sizes = {n: self._dim(n, limit) for n in (names or known)}
        return {i.name: {axis: sizes[n] for axis, n in i.dims.items() if n in sizes} or None for i in self.inputs}

    def _dim(self, name: str, limit: int) -> Any:
        if name == "batch":
            return torch.export.Dim(name, min=1, max=min(limit, LARGEST_BATCH))
        multiple = self.multiples.get(name, 1)
        if multiple == 1:
            return torch.export.Dim(name, min=1, max=limit)
        # From 2 on: a map of one pixel at the deepest level broadcasts, which is another graph.
        return multiple * torch.export.Dim(f"{name}_by_{multiple}", min=2, max=limit // multiple)

    @cached_property
    def parameters(self) -> int:
        """The number of parameters that the module holds, counted on the meta device."""
        return sum(p.numel() for p in self.skeleton().parameters())
