"""A scheduler for diffusers' pipelines that steps through a solver table.

``pipe.scheduler = hasten.Scheduler.from_config(pipe.scheduler)`` changes nothing but who does the arithmetic;
with ``solver="unipc:order=3"`` the pipeline samples with another solver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hasten.errors import UsageError
from hasten.passes.solvers import start
from hasten.passes.solvers.draw import Generators, unit_noise
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.sample import hooked_step, step
from hasten.passes.solvers.scheduler_config import Configured
from hasten.passes.solvers.table import SolverTable

# Pipelines save, load and are given only what is a SchedulerMixin, under the name that it has in this module.
if TYPE_CHECKING or find_spec("diffusers") is None:
    SchedulerMixin = object
else:
    SchedulerMixin = import_module("diffusers.schedulers.scheduling_utils").SchedulerMixin

OF_TRAINING = ("ddim", "plms", "pndm")
"""Solvers whose schedulers in diffusers add the noise of any training time, whatever the run does."""


class Stepped(NamedTuple):
    """What a step returns: the sample to go on with, and the predicted x0."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class Scheduler(Configured, SchedulerMixin):
    """A solver behind the interface that diffusers' pipelines expect.

    The sample between steps is what the network sees, so `scale_model_input` returns it as it is and
    ``init_noise_sigma`` is near 1, also where the diffusers scheduler keeps a sample of another scale. It may be
    changed between steps, also in place, as inpainting does. The state is kept in float32 whatever the sample's type:
    where a half-precision sample comes back as it was returned, what its rounding cut off is not lost.
    """

    def __init__(self, config: Mapping[str, Any], solver: str | None = None) -> None:
        super().__init__(config, solver)
        self.timesteps = torch.arange(self.process.train_steps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._table: SolverTable | None = None
        self._asked = self.request
        self._rewind()

    def __len__(self) -> int:
        """Count the training's times."""
        return self.process.train_steps

    @property
    def table(self) -> SolverTable:
        """The table of the last `set_timesteps`."""
        if self._table is None:
            raise UsageError("scheduler: call set_timesteps(steps) first; there is no table before")
        return self._table

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is scaled by to be the first sample."""
        return 1.0 if self._table is None else self._table.init

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise over signal, or the noise level of a flow, at every evaluation and the end, (M + 1,) on the CPU."""
        signal, noise = self.table.level.T
        return torch.tensor(noise if self.process.is_flow else noise / np.maximum(signal, 1e-8), dtype=torch.float32)

    @property
    def step_index(self) -> int | None:
        """The next row, once a step has been taken."""
        return self._index

    @property
    def begin_index(self) -> int | None:
        """The row to start with, where the pipeline has set one."""
        return self._begin

    def set_begin_index(self, begin_index: int | None = 0) -> None:
        """Start at a later row, as image-to-image does."""
        self._begin: int | None = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Build the table of so many steps, or of the caller's own times or levels; ``mu``: a flow's dynamic shift.

        ``timesteps``, for the pipeline to go through, is set on ``device``: whole numbers where all times are whole.
        """
        own = timesteps if timesteps is not None else sigmas
        if num_inference_steps is None and own is None:
            raise UsageError("scheduler: set_timesteps needs a number of steps, timesteps or sigmas; none was given")
        steps = num_inference_steps if own is None else len(own)
        told = any(self.request.options.get(key) is not None for key in ("mu", "tokens", "shift"))
        if self.config.get("use_dynamic_shifting") and mu is None and "mu" in self.request.options and not told:
            raise UsageError("scheduler: the configuration has use_dynamic_shifting, so set_timesteps needs mu")
        given = {"times": timesteps, "sigmas": sigmas, "mu": mu}
        listed = {k: v if k == "mu" else np.asarray(v, np.float64).tolist() for k, v in given.items() if v is not None}
        self._asked = self.request.with_options(**listed)
        self._table = self._asked.build(self.process, int(steps or 0))
        self.num_inference_steps = steps
        times = torch.from_numpy(self._table.time.copy())
        whole = bool((times == times.round()).all())
        self.timesteps = times.to(device=device, dtype=torch.int64 if whole else torch.float32)
        self._rewind()

    def _rewind(self) -> None:
        self._index: int | None = None
        self._begin = None
        self._state: list[torch.Tensor] = []
        self._running: dict[tuple[float, bool], SolverTable] = {}
        self._late = 0  # the row at which the running tables begin

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the sample: it is what the network sees."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> Stepped | tuple[torch.Tensor]:
        """Go through one row: from the sample that the network saw to the next.

        ``variance_noise`` is unit noise to use instead of drawing it with ``generator``, one or one for each picture.
        ``eta`` (fresh noise; 0: the solver's own) and ``use_clipped_model_output`` are DDIM's, and pipelines give them
        to all: others ignore them. Returns ``prev_sample`` in the sample's type, and the predicted x0, clipped where
        the solver clips it.
        """
        row = self._begin_at(timestep)
        if row >= len(self.table):
            raise UsageError(f"scheduler: all {len(self.table)} steps are taken; call set_timesteps to start again")
        table, index = self._of_step(float(eta or 0), bool(use_clipped_model_output)), row - self._late
        given = self._taken_up(sample)
        state = [given, *(self._state[1:] or [torch.zeros_like(given) for _ in range(table.width - 1)])]
        prediction = model_output.float()
        noise = self._noise(given, generator, variance_noise) if index in table.noisy else None
        if self.hook is None:
            self._state = step(table.fold(), index, state, prediction, noise)
        else:
            self._state = hooked_step(table, index, state, prediction, noise, self.hook)
        self._index = row + 1
        stepped = self._state[0].to(sample.dtype)
        if not return_dict:
            return (stepped,)
        of_input, of_output = table.fold().clean[index].tolist()
        x0 = given * of_input + prediction * of_output
        return Stepped(stepped, (x0 if self.hook is None else self.hook(x0)).to(sample.dtype))

    def _taken_up(self, sample: torch.Tensor) -> torch.Tensor:
        """The sample in float32, with what rounding to its type cut off where it is still what was returned.

        Values are compared: a sample may be changed in place, which under `torch.inference_mode` nothing counts.
        """
        if not self._state or sample.dtype == torch.float32:
            return sample.float()
        kept = self._state[0]
        return torch.where(sample == kept.to(sample.dtype), kept, sample.float())

    def _of_step(self, eta: float, clipped: bool) -> SolverTable:
        """The table of a step: that of `set_timesteps`, or of what is left of it, with what DDIM is asked for."""
        key = (eta, clipped) if self.request.name == "ddim" else (0.0, False)
        if key not in self._running:
            eta, clipped = key
            changes = {**({"eta": eta} if eta else {}), **({"keep_eps": False} if clipped else {})}
            asked = self._asked.with_options(**changes) if changes else self._asked
            steps = int(self.num_inference_steps or 0)
            whole = not changes and not self._late
            self._running[key] = self.table if whole else asked.build(self.process, steps, first=self._late)
        return self._running[key]

    def _begin_at(self, timestep: Any) -> int:
        """The row of this step: the next, or at first the one that begins."""
        if self._index is None:
            table = self.table
            self._index = self._begin if self._begin is not None else self.index_for_timestep(timestep)
            # Rows that need nothing of those before but the sample are run as they are; others are made anew.
            if self._index and _remembers(table, self._index):
                self._late = self._index
        return self._index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The row with this time; of two, the second: there a method with two evaluations a step begins one."""
        times = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (times.cpu() == torch.as_tensor(timestep).cpu()).nonzero()
        if not len(found):
            raise UsageError(
                f"scheduler: {float(timestep):g} is none of the timesteps; pass one of scheduler.timesteps"
            )
        return int(found[min(1, len(found) - 1)])

    @staticmethod
    def _noise(like: torch.Tensor, generator: Generators, given: torch.Tensor | None) -> torch.Tensor:
        return unit_noise(like.shape, generator, like.device) if given is None else given.float()

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the network would see of ``original_samples`` (B, ...) with ``noise``, as diffusers decides when.

        That is at ``timesteps``, one or (B,), any times of the training: at the level that the run has there, or else
        the training's. Where a pipeline has set where to begin, it is at the run's next row instead, whatever the
        times, but for DDIM and PNDM.
        """
        times = torch.as_tensor(timesteps).reshape(-1)
        if self._begin is None or self._table is None or self.request.name in OF_TRAINING:
            pairs = self._levels(times.cpu().double().numpy())
        else:
            row = self._begin if self._index is None else self._index
            pairs = self._table.level[[min(row, len(self._table))] * len(times)]
        signal, level = torch.tensor(pairs.T, dtype=torch.float32, device=original_samples.device)
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        noisy = signal.reshape(shape) * original_samples + level.reshape(shape) * noise
        return noisy.to(original_samples.dtype)

    def _levels(self, times: Array) -> Array:
        """Signal and noise level at training times, (B, 2)."""
        last = self.process.train_steps - (not self.process.is_flow)
        if (outside := times[(times < 0) | (times > last)]).size:
            raise UsageError(f"scheduler: {outside[0]:g} is no time of the training; they go from 0 to {last}")
        found = start.levels(self.process, times)
        if self._table is None or self.request.name in OF_TRAINING:
            return found
        grid = self.timesteps.cpu().double().numpy()
        for i, time in enumerate(times):
            if (rows := np.flatnonzero(grid == time)).size:
                found[i] = self._table.level[rows[min(1, rows.size - 1)]]
        return found

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return `add_noise` under the name that flow schedulers have for it."""
        return self.add_noise(sample, noise, timestep)


def _remembers(table: SolverTable, first: int) -> bool:
    """Whether a row from ``first`` on, or the result, depends on what a latent beside the sample holds there."""
    kept = np.eye(table.width)[:, 1:]
    for weights, carried in zip(table.input[first:], table.fold().A[first:], strict=True):
        if (weights @ kept).any():
            return True
        kept = carried @ kept
    return bool((table.output @ kept).any())
