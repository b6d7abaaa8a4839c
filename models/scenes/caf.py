"""Constant acceleration flow on `scenes` (CAF, Park et al., 2411.00322): the networks of velocity and acceleration.

Time runs from 0 (noise x_0) to 1 (picture x_1). With the initial velocity ``v = h (x_1 - x_0)`` and the acceleration
``a = 2 (x_1 - x_0) - 2 v`` the path ``x_0 + v t + a t^2 / 2`` is a straight line that is run through unevenly: at time
t it is where rectified flow is at the noise level ``1 - h t - (1 - h) t^2``. So the transformer of `scenes-dit`, which
predicts ``x_0 - x_1`` at a noise level, is where both networks start, and both are one set of weights here: a second
picture beside the sample is the velocity for the acceleration, and zero for the velocity network, as in the authors'
program, whose two networks have weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from hasten.errors import UsageError
from hasten.models.registry import get
from hasten.models.scenes.adapters import specification
from hasten.models.scenes.generate import initial_noise
from hasten.models.scenes.subject import subject
from hasten.models.scenes.weights import read
from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.sample import sample

TEACHER = "scenes-dit"
WEIGHTS = Path(__file__).parent / "caf.safetensors"
H = 1.5
"""The initial velocity in terms of the mean one; above 1 the flow slows down towards the picture."""

Network = Callable[..., torch.Tensor]


def noise_level(time: torch.Tensor) -> torch.Tensor:
    """The noise level of rectified flow at the same place of the line, for times (B,) from 0 to 1."""
    return 1 - H * time - (1 - H) * time * time


class Velocity(nn.Module):
    """Samples (B, 3, 32, 32), times (B,) and classes (B,) to the initial velocity; the time is 0, inverted 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Predict it."""
        return -H * backwards(self.model, sample, torch.zeros_like(sample), timestep, class_labels)


class Acceleration(nn.Module):
    """Samples, times, classes and the initial velocity to the acceleration, all of a batch of B."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, velocity: torch.Tensor
    ) -> torch.Tensor:
        """Predict it."""
        return -2 * backwards(self.model, sample, velocity, timestep, class_labels) - 2 * velocity


def backwards(
    model: nn.Module, sample: torch.Tensor, beside: torch.Tensor, time: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """What the transformer predicts, ``x_0 - x_1``, (B, 3, 32, 32)."""
    both = torch.cat([sample, beside], 1)
    found: torch.Tensor = model(both, 1000 * noise_level(time), labels, return_dict=False)[0]
    return found.to(sample.dtype)


def untrained(seed_weights: nn.Module | None = None) -> nn.Module:
    """The transformer with room for the second picture, which it does not look at yet; otherwise ``seed_weights``.

    They are those of `TEACHER` unless given; the result is in evaluation mode.
    """
    import diffusers

    spec = specification(TEACHER)["config"]
    channels = spec["in_channels"]
    model = diffusers.DiTTransformer2DModel(**{**spec, "in_channels": 2 * channels})
    seed = seed_weights or get(TEACHER).module().get_submodule("model")
    weights = dict(seed.state_dict())
    narrow = weights["pos_embed.proj.weight"]
    wide = torch.cat([narrow, torch.zeros_like(narrow)], 1)
    model.load_state_dict({**weights, "pos_embed.proj.weight": wide})
    return model.eval()


def load(weights: Path = WEIGHTS) -> tuple[Velocity, Acceleration]:
    """Return the trained networks in evaluation mode, in float32, without gradients."""
    tensors = read(weights, "constant acceleration flow", "hasten.models.scenes.train_caf")
    model = untrained()
    model.load_state_dict(tensors)
    model.requires_grad_(False)
    return Velocity(model).eval(), Acceleration(model).eval()


def generate(
    networks: Sequence[Network], labels: Sequence[int] | torch.Tensor, *, steps: int = 1, seed: int = 0
) -> torch.Tensor:
    """Make one picture a label with ``steps`` + 1 evaluations, (B, 3, 32, 32) float32 in [-1, 1].

    ``networks`` are velocity and acceleration, eager or engines. The noise is that of `generate.generate`.
    """
    label = _labels(labels)
    return run(networks, initial_noise(get(TEACHER), len(label), seed), label, steps=steps).clamp(-1, 1)


def run(
    networks: Sequence[Network],
    start: torch.Tensor,
    labels: Sequence[int] | torch.Tensor,
    *,
    steps: int = 1,
    inverse: bool = False,
) -> torch.Tensor:
    """Go from noise (B, 3, 32, 32) to pictures, not clamped, or with ``inverse`` from pictures to noise."""
    label = _labels(labels)
    velocity, acceleration = networks

    def told(time: float) -> torch.Tensor:
        return torch.full((len(label),), time)

    with torch.no_grad():
        found: torch.Tensor = sample(
            [lambda x, t: velocity(x, told(t), label), lambda x, t, v: acceleration(x, told(t), label, v)],
            caf(steps, inverse=inverse),
            start,
        )
    return found


def _labels(labels: Sequence[int] | torch.Tensor) -> torch.Tensor:
    label = torch.as_tensor(labels, dtype=torch.int64)
    classes = len(subject(specification(TEACHER)).classes)
    if label.ndim != 1 or not ((label >= 0) & (label < classes)).all():
        raise UsageError(f"caf: labels are a list of numbers from 0 to {classes - 1}; {labels} was given")
    return label
