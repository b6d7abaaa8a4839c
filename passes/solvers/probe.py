"""The table of any linear diffusers scheduler, from what it does with basis vectors.

The scheduler is not looked into: a copy of it is given e_0 as noise, e_{1 + i} as the i-th output of the network, and
the rest of the vector to draw fresh noise in. Its last sample, and what it would have the network see, are then the
rows of its response matrix. torch is imported here, diffusers is not.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.compress import compress
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.table import SolverTable

TOLERANCE = 3e-6
"""Schedulers compute in float32. Those that lose more of it, as DEIS of order 3 does, get more latents for it."""
NOT_LINEAR = {
    "clip_sample": "it clips the predicted sample",
    "thresholding": "it thresholds the predicted sample",
    "clip_denoised": "it clips the predicted sample",
}
"""Options that make a scheduler's step more than a linear function, and why."""
SEED = 0


def from_scheduler(
    scheduler: Any, steps: int, *, timesteps: Mapping[str, Any] | None = None, **step: Any
) -> SolverTable:
    """Build the table of ``steps`` steps of ``scheduler``; it is copied, and left as it is.

    ``timesteps`` go to its ``set_timesteps`` (``{"sigmas": …}``, ``{"mu": …}``), ``step`` to every step (``eta=1.0``).
    The coefficients have the precision of the scheduler, which is float32. `UsageError` names a scheduler that is not
    linear, and why.
    """
    name = type(scheduler).__name__
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise UsageError(f"from_scheduler: expected a diffusers scheduler, found {name}, which has no {method}")
    if steps < 1:
        raise UsageError(f"{name}: {steps} sampling steps were asked for; at least 1 is needed")
    config = getattr(scheduler, "config", {})
    for option, why in NOT_LINEAR.items():
        if config.get(option):
            raise UsageError(f"{name} is not linear: {why} ({option}=True); no table can, take it as a hook of sample")
    if str(config.get("variance_type")).startswith("learned"):
        raise UsageError(f"{name} takes a variance from the network beside its prediction; no table does")
    matrix, noise, times, drawn = _responses(scheduler, steps, dict(timesteps or {}), step, name)
    return compress(np.concatenate([matrix, noise], axis=1), times, drawn, tolerance=TOLERANCE)


def _responses(
    scheduler: Any, steps: int, timesteps: dict[str, Any], step: dict[str, Any], name: str
) -> tuple[Array, Array, Array, tuple[int, ...]]:
    """``(matrix, noise, times, drawn)``; the matrix is checked against a run on random vectors."""
    import torch

    run = _Run(scheduler, steps, timesteps, step, name)
    count = len(run.times)
    size = 1 + count
    spare = 2 * count + 16  # room in which fresh noise is told from fresh noise
    basis = torch.eye(size, size + spare)
    # The same draws twice, once with nothing else: the difference is what is not noise, and the rest is noise alone.
    with_basis, _ = run(basis[0], basis[1:])
    alone, draws = run(torch.zeros(size + spare), torch.zeros(count, size + spare))
    matrix = (with_basis - alone)[:, :size].double().numpy()
    drawn = tuple(i for i, z in enumerate(draws) if z is not None)
    noise = np.zeros((count + 1, len(drawn)))
    if drawn:
        known = torch.stack([draws[i] for i in drawn]).double().numpy()
        noise = np.linalg.lstsq(known.T, alone.double().numpy().T, rcond=None)[0].T
        largest = max(float(np.abs(noise).max()), 1e-30)
        used = np.abs(noise).max(axis=0) > 1e-5 * largest  # some schedulers draw what they multiply by zero
        noise[np.abs(noise) < 1e-7 * largest] = 0
        drawn, noise, known = tuple(np.array(drawn)[used].tolist()), noise[:, used], known[used]
    matrix[:, 1:] = np.tril(matrix[:, 1:], -1)

    generator = torch.Generator().manual_seed(SEED + 1)
    x, outputs = torch.randn(size + spare, generator=generator), torch.randn(count, size + spare, generator=generator)
    # far from 1, so that a bound on values is noticed
    got, again = run(100 * x, 100 * outputs)
    wanted = 100 * matrix @ torch.cat([x[None], outputs]).double().numpy()
    if drawn:
        wanted += noise @ torch.stack([again[i] for i in drawn]).double().numpy()
    error = np.abs(got.double().numpy() - wanted).max() / np.abs(wanted).max()
    if not error < 1e-3:
        raise UsageError(
            f"{name} is not linear: with random outputs its samples are {error:.0%} away from the sum of what each "
            "of them does alone; no table can describe it"
        )
    return matrix, noise, run.times, drawn


class _Run:
    """Runs of a scheduler on vectors, all with the same fresh noise."""

    def __init__(self, scheduler: Any, steps: int, timesteps: dict[str, Any], step: dict[str, Any], name: str) -> None:
        self.scheduler, self.steps, self.timesteps, self.step, self.name = scheduler, steps, timesteps, step, name
        self.takes = inspect.signature(scheduler.step).parameters
        self.times = self.fresh().timesteps.double().cpu().numpy()

    def fresh(self) -> Any:
        """A copy that is about to take its first step."""
        scheduler = copy.deepcopy(self.scheduler)
        try:
            if any(key in self.timesteps for key in ("sigmas", "timesteps")):
                scheduler.set_timesteps(**self.timesteps)
            else:
                scheduler.set_timesteps(self.steps, **self.timesteps)
        except Exception as error:
            raise UsageError(f"{self.name} refuses {self.steps} steps: {error}") from error
        return scheduler

    def __call__(self, x: Any, outputs: Any) -> tuple[Any, list[Any]]:
        """What the network would see at every step and the result, (M + 1, D), and the noise that each step drew."""
        import torch

        scheduler, generator = self.fresh(), torch.Generator().manual_seed(SEED)
        extra = {**self.step, **({"generator": generator} if "generator" in self.takes else {})}
        scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
        sample = x[None] * float(getattr(scheduler, "init_noise_sigma", 1.0))
        rows, draws = [], []
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            rows.append(scale(sample, t))
            before = generator.get_state()
            try:
                sample = scheduler.step(output[None], t, sample, return_dict=False, **extra)[0]
            except Exception as error:
                raise UsageError(f"{self.name} cannot step on vectors: {error}") from error
            moved = not torch.equal(before, generator.get_state())
            draws.append(torch.randn(sample.shape, generator=torch.Generator().set_state(before))[0] if moved else None)
        result = torch.cat([*rows, sample])
        if not result.isfinite().all():
            raise UsageError(f"{self.name} gives values that are not finite at {self.steps} steps")
        return result, draws
