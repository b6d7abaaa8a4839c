"""`Process`: what a network was trained on, which is all that a solver must know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.prediction import PREDICTIONS, Array, convert
from hasten.passes.solvers.schedule import alpha_bar, betas, zero_terminal_snr


@dataclass(frozen=True, eq=False)
class Process:
    """A diffusion process or a rectified flow, and what the network predicts.

    ``bars`` (T,) is alpha_bar at the training times, or None for a flow, whose levels a sampler moves by ``shift``
    unless it is told another. ``train_steps`` is T; a flow's network is told ``s * train_steps``.
    """

    prediction: str = "epsilon"
    bars: Array | None = None
    shift: float = 1.0
    train_steps: int = 1000

    def __post_init__(self) -> None:
        convert(self.prediction, "x0", 0.5, 0.5)  # refuses what is no prediction
        if self.bars is None:
            return
        bars = np.array(self.bars, np.float64)
        if bars.ndim != 1 or len(bars) < 2 or not np.isfinite(bars).all():
            raise UsageError(f"process: alpha_bar is one finite number a training time, not shape {bars.shape}")
        if (np.diff(bars) >= 0).any() or bars[0] >= 1 or bars[-1] < 0:
            raise UsageError(
                f"process: alpha_bar falls from below 1 to 0 at least; it goes from {bars[0]:g} to {bars[-1]:g}"
            )
        bars.flags.writeable = False
        object.__setattr__(self, "bars", bars)
        object.__setattr__(self, "train_steps", len(bars))

    @property
    def is_flow(self) -> bool:
        """Whether this is a rectified flow."""
        return self.bars is None

    @classmethod
    def diffusion(
        cls,
        schedule: str = "scaled_linear",
        *,
        prediction: str = "epsilon",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        train_steps: int = 1000,
        zero_snr: bool = False,
    ) -> Process:
        """Make a diffusion process from a schedule's name, see `betas`; ``zero_snr``: `zero_terminal_snr`."""
        bars = alpha_bar(schedule, train_steps, start=beta_start, end=beta_end)
        return cls(prediction, zero_terminal_snr(bars) if zero_snr else bars)

    @classmethod
    def flow(cls, shift: float = 1.0, *, prediction: str = "flow_prediction", train_steps: int = 1000) -> Process:
        """Make a rectified flow."""
        return cls(prediction, None, shift, train_steps)

    @classmethod
    def of(cls, specification: Mapping[str, Any]) -> Process:
        """Read a process from a bundled model's specification, or from the configuration of a diffusers scheduler.

        The former has ``objective``, ``schedule`` and, for a flow, ``shift``; the latter ``beta_schedule`` and so on.
        """
        get = specification.get
        if "objective" in specification:
            if specification["objective"] == "flow_prediction":
                return cls.flow(float(get("shift", 1.0)))
            return cls.diffusion(specification["schedule"], prediction=specification["objective"])
        train_steps = int(get("num_train_timesteps", 1000))
        if get("use_flow_sigmas") or "beta_schedule" not in specification:
            shift = get("flow_shift") if get("use_flow_sigmas") else get("shift")
            if shift is None:
                raise UsageError(
                    "process: neither beta_schedule nor shift is in what was given; "
                    "give a model's specification or the configuration of a diffusers scheduler"
                )
            prediction = get("prediction_type", "flow_prediction")
            return cls.flow(float(shift), prediction=prediction, train_steps=train_steps)
        prediction = get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS and prediction == "original_sample":
            prediction = "sample"
        if get("trained_betas") is not None:
            steps = np.asarray(specification["trained_betas"], np.float64)
        else:
            ends = {"start": get("beta_start", 0.0001), "end": get("beta_end", 0.02)}
            steps = betas(specification["beta_schedule"], train_steps, **ends)
        bars: Array = np.cumprod(1 - steps, dtype=np.float64)
        return cls(prediction, zero_terminal_snr(bars) if get("rescale_betas_zero_snr") else bars)
