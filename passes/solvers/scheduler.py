"""A scheduler for diffusers' pipelines that steps through a solver table; diffusers itself is not imported.

``pipe.scheduler = hasten.Scheduler.from_config(pipe.scheduler)`` changes nothing but who does the arithmetic;
with ``solver="unipc:order=3"`` the pipeline samples with another solver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hasten.errors import UsageError
from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.sample import hooked_step, step
from hasten.passes.solvers.table import SolverTable


class Config(dict[str, Any]):
    """A diffusers configuration: a mapping whose keys can be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the configuration has no {name!r}")
        return self[name]


class Stepped(NamedTuple):
    """What a step returns: the sample to go on with, and the predicted x0."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class Scheduler:
    """A solver behind the interface that diffusers' pipelines expect.

    The sample between steps is what the network sees, so `scale_model_input` returns it as it is and
    ``init_noise_sigma`` is near 1, also where the diffusers scheduler keeps a sample of another scale. It may be
    changed between steps, as inpainting does. The state is kept in float32 whatever the sample's type.
    """

    def __init__(self, config: Mapping[str, Any], solver: str | None = None) -> None:
        self.config = Config(config)
        self.request, self.process, self.hook = (read := read_config(config, solver)).request, read.process, read.hook
        self.order = 2 if self.request.name == "heun" else 1
        self.timesteps = torch.arange(self.process.train_steps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._table: SolverTable | None = None
        self._asked = self.request
        self._rewind()

    @classmethod
    def from_config(cls, config: Any, solver: str | None = None, **overrides: Any) -> Scheduler:
        """Make one from a diffusers scheduler or its configuration, some options of which may be overridden.

        ``solver`` is a request for the catalog, as ``unipc:order=3``; the scheduler's own unless given. A configuration
        that clips or thresholds the predicted x0 goes on doing so.
        """
        kind = type(config).__name__ if hasattr(config, "config") else None
        given = {**getattr(config, "config", config), **overrides}
        if kind is not None and kind != cls.__name__:
            given.setdefault("_class_name", kind)
        return cls(given, solver)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration as ``scheduler_config.json``, which diffusers reads as that of its own scheduler."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.config.items()}
        (folder / "scheduler_config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

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
        return torch.from_numpy(noise if self.process.is_flow else noise / np.maximum(signal, 1e-8)).float()

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
        if self.config.get("use_dynamic_shifting") and mu is None and "mu" in self.request.options:
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
        self._last: torch.Tensor | None = None
        self._running: SolverTable | None = None  # of a run that started late, at row `_late`
        self._late = 0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the sample: it is what the network sees."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Stepped | tuple[torch.Tensor]:
        """Go through one row: from the sample that the network saw to the next.

        ``variance_noise`` is unit noise to use instead of drawing it with ``generator``. Returns ``prev_sample`` in the
        sample's type, and the predicted x0 (before clipping).
        """
        table = self.table
        row = self._begin_at(timestep)
        if row >= len(table):
            raise UsageError(f"scheduler: all {len(table)} steps are taken; call set_timesteps to start again")
        table, index = self._running or table, row - self._late
        given = sample.float() if sample is not self._last else self._state[0]
        if not self._state:
            self._state = [torch.zeros_like(given) for _ in range(table.width)]
        state = [given, *self._state[1:]]
        prediction = model_output.float()
        noise = self._noise(given, generator, variance_noise) if index in table.noisy else None
        weights = table.fold().clean[index].tolist()
        x0 = given * weights[0] + prediction * weights[1]
        if self.hook is None:
            self._state = step(table.fold(), index, state, prediction, noise)
        else:
            self._state = hooked_step(table, index, state, prediction, noise, self.hook)
        self._index = row + 1
        self._last = self._state[0].to(sample.dtype)
        return Stepped(self._last, x0.to(sample.dtype)) if return_dict else (self._last,)

    def _begin_at(self, timestep: Any) -> int:
        """The row of this step: the next, or at first the one that begins."""
        if self._index is None:
            self._index = self._begin if self._begin is not None else self.index_for_timestep(timestep)
            # A row that needs nothing but the sample can be the first one; other tables are made anew from there.
            if self._index and self._index < len(self.table) and self.table.A[self._index, 0, 1:].any():
                steps = int(self.num_inference_steps or 0)
                self._running = self._asked.build(self.process, steps, first=self._index)
                self._late = self._index
        return self._index

    def index_for_timestep(self, timestep: Any) -> int:
        """The first row with this time."""
        found = (self.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero()
        if not len(found):
            raise UsageError(
                f"scheduler: {float(timestep):g} is none of the timesteps; pass one of scheduler.timesteps"
            )
        return int(found[0])

    @staticmethod
    def _noise(like: torch.Tensor, generator: torch.Generator | None, given: torch.Tensor | None) -> torch.Tensor:
        if given is not None:
            return given.float()
        device = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like.device)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the network would see of ``original_samples`` at the steps with these times, (B, ...)."""
        if self._index is not None:
            rows = [min(self._index, len(self.table))] * len(timesteps)
        elif self._begin is not None:
            rows = [self._begin] * len(timesteps)
        else:
            rows = [self.index_for_timestep(t) for t in timesteps]
        signal, level = torch.from_numpy(self.table.level[rows].T.copy()).to(original_samples.device)
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        noisy = signal.float().reshape(shape) * original_samples + level.float().reshape(shape) * noise
        return noisy.to(original_samples.dtype)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return `add_noise` under the name that flow schedulers have for it."""
        return self.add_noise(sample, noise, timestep)
