"""How a model is sampled while it is recorded or judged: its own loop for bundled models, example inputs for others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hasten.errors import UsageError
from hasten.models.adapter import Adapter

Denoise = Callable[..., torch.Tensor]
"""The model's tensors, positionally, to its first output."""
GUIDANCE = 2.0


@dataclass(frozen=True)
class Draw:
    """One run: the seed of its noise, and what it draws."""

    seed: int
    label: str


class Runs(Protocol):
    """Runs of one model with fixed settings. ``adapter`` has the batch of one run; ``how`` says what a run is.

    ``peak`` is the range of the result for a PSNR, None where there is no such thing.
    """

    adapter: Adapter
    steps: int
    how: str
    peak: float | None

    @property
    def guidance(self) -> float | None: ...

    def draws(self, count: int, seed: int, labels: Sequence[int] | None) -> list[Draw]: ...

    def run(self, denoise: Denoise, draw: Draw) -> torch.Tensor: ...


def runs_of(adapter: Adapter, steps: int, guidance: float | None) -> Runs:
    """The model's own sampling loop where it is bundled, else a loop over its example inputs."""
    from hasten.models.scenes.adapters import MODELS

    if adapter.name in MODELS:
        return Scenes(adapter, steps, GUIDANCE if guidance is None else guidance)
    if guidance is not None:
        raise UsageError(
            f"guidance {guidance:g} was given, and {adapter.name} is run on its example inputs, without prompts; "
            "leave it out"
        )
    return Examples(adapter, steps)


class Scenes:
    """A bundled model: one picture or clip a run, by its own solver, with classifier-free guidance."""

    peak: float | None = 2.0

    def __init__(self, adapter: Adapter, steps: int, guidance: float) -> None:
        from hasten.models.scenes.adapters import specification
        from hasten.models.scenes.subject import subject

        self.adapter = dataclasses.replace(adapter, batch=1 if guidance == 1 else 2)
        self.steps, self.guidance = steps, guidance
        self.classes = list(subject(specification(adapter.name)).classes)
        self.how = "the model's own sampling loop, from noise to the finished picture or clip"

    def draws(self, count: int, seed: int, labels: Sequence[int] | None) -> list[Draw]:
        """Classes in turn, unless ``labels`` are given; run i has the seed ``seed + i``."""
        if labels is not None and (wrong := [n for n in labels if not 0 <= n < len(self.classes)]):
            raise UsageError(f"labels: {wrong[0]} was given; {self.adapter.name} draws 0 to {len(self.classes) - 1}")
        # 5 and 48 have no common divisor, nor have 5 and 16, so that all classes come up
        order = labels or [(5 * i) % len(self.classes) for i in range(count)]
        return [Draw(seed + i, self.classes[order[i % len(order)]]) for i in range(count)]

    def run(self, denoise: Denoise, draw: Draw) -> torch.Tensor:
        """Sample: pixels in [-1, 1]."""
        from hasten.models.scenes.generate import generate

        label = self.classes.index(draw.label)
        return generate(
            denoise, self.adapter, [label], steps=self.steps, guidance=self.guidance, seed=draw.seed
        ).double()


class Examples:
    """Any other model: example inputs drawn per seed; the first input moves by Euler's steps as if it were a flow.

    The prompts are random numbers, and the loop is not the model's own sampler, so what is fitted is a first guess.
    """

    peak: float | None = None
    guidance: float | None = None

    def __init__(self, adapter: Adapter, steps: int) -> None:
        self.adapter, self.steps = adapter, steps
        names = [i.name for i in adapter.inputs]
        if "timestep" not in names:
            raise UsageError(f"{adapter.name} has no input 'timestep' (it has {', '.join(names)}): it takes no steps")
        self.how = (
            "example inputs drawn for each seed, random prompts among them, over a descending grid of timesteps by "
            "Euler's method; this is not the model's own sampler"
        )

    def draws(self, count: int, seed: int, labels: Sequence[int] | None) -> list[Draw]:
        """Run i has the seed ``seed + i``."""
        if labels is not None:
            raise UsageError(f"labels are for bundled models; {self.adapter.name} is run on its example inputs")
        return [Draw(seed + i, "example inputs") for i in range(count)]

    def run(self, denoise: Denoise, draw: Draw) -> torch.Tensor:
        """Sample: what stands in the first input at the end."""
        inputs = self.adapter.example_inputs(seed=draw.seed)
        x, *_ = inputs.values()
        name, scale = next(iter(inputs)), 1000.0 if float(inputs["timestep"].max()) > 1 else 1.0
        for step in range(self.steps):
            here, there = (1 - n / self.steps for n in (step, step + 1))
            time = torch.full_like(inputs["timestep"], min(here * scale, scale * 0.999))
            with torch.no_grad():
                change = denoise(*{**inputs, name: x, "timestep": time}.values()).float()
            x = x + (there - here) * _like(change, x)
        return x.double()


def _like(change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The first channels of a prediction that has a variance beside it; nothing where the shapes do not go together."""
    if change.shape == x.shape:
        return change
    if change.ndim == x.ndim and change.ndim > 1 and change.shape[1] > x.shape[1]:
        return _like(change[:, : x.shape[1]], x)
    return torch.zeros_like(x)


def decibels(error: float, peak: float | None) -> float | None:
    """The PSNR of a mean squared error; None without a peak, or where there is no error."""
    return None if peak is None or error <= 0 else 10 * math.log10(peak**2 / error)


def cast(denoise: Denoise, examples: Sequence[Any]) -> Denoise:
    """The same model for float32 tensors, given to it in the types of its own examples."""
    types = [e.dtype for e in examples]
    return lambda *tensors: denoise(*(t.to(d) for t, d in zip(tensors, types, strict=True)))
