"""`Process`: what a network was trained on, which is all that a solver must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.configuration import Config, completed, configuration
from hasten.passes.solvers.dynamic_shift import DynamicShift
from hasten.passes.solvers.prediction import PREDICTIONS, Array, convert
from hasten.passes.solvers.schedule import alpha_bar, betas, snr_shifted, zero_terminal_snr


@dataclass(frozen=True, eq=False)
class Process:
    """A diffusion process or a rectified flow, and what the network predicts.

    ``bars`` (T,) is alpha_bar at the training times, or None for a flow, whose levels a sampler moves by ``shift``
    unless it is told another; where it is ``dynamic`` a sampler must be told how far. ``train_steps`` is T; a flow's
    network is told ``s * train_steps``, and where it is ``inverted`` ``(1 - s) * train_steps``: it then predicts the
    negative of what ``prediction`` says.
    """

    prediction: str = "epsilon"
    bars: Array | None = None
    shift: float = 1.0
    train_steps: int = 1000
    inverted: bool = False
    dynamic: DynamicShift | None = None

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
        snr_shift: float = 1.0,
    ) -> Process:
        """Make a diffusion process from a schedule's name, see `betas`.

        ``snr_shift``: `snr_shifted`; then ``zero_snr``: `zero_terminal_snr`.
        """
        bars = snr_shifted(alpha_bar(schedule, train_steps, start=beta_start, end=beta_end), snr_shift)
        return cls(prediction, zero_terminal_snr(bars) if zero_snr else bars)

    @classmethod
    def flow(
        cls,
        shift: float = 1.0,
        *,
        prediction: str = "flow_prediction",
        train_steps: int = 1000,
        inverted: bool = False,
        dynamic: DynamicShift | None = None,
    ) -> Process:
        """Make a rectified flow."""
        return cls(prediction, None, shift, train_steps, inverted, dynamic)

    @classmethod
    def of(cls, specification: Any) -> Process:
        """Read a process from a bundled model's specification, or from a diffusers scheduler or its configuration.

        The former has ``objective``, ``schedule`` and, for a flow, ``shift``; the latter ``beta_schedule`` and so on,
        and may have ``mu``, a dynamic shift's for samplers that are told none.
        `UsageError` for a value of a wrong type, and for a process that no solver here is for.
        """
        config = completed(configuration(specification))
        get = config.get
        if "objective" in config:
            if config["objective"] == "flow_prediction":
                return cls.flow(float(get("shift", 1.0)))
            return cls.diffusion(config["schedule"], prediction=config["objective"])
        if get("timestep_type", "discrete") != "discrete":
            raise UsageError(
                f"process: timestep_type={config['timestep_type']!r} is of a network that is told a function of the "
                "noise level, and solvers here tell it the training time; SolverTable.from_scheduler takes the "
                "scheduler itself"
            )
        if get("use_flow_sigmas") or "beta_schedule" not in config:
            return cls._flow_of(config)
        prediction = get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS and prediction == "original_sample":
            prediction = "sample"
        if get("trained_betas") is not None:
            steps = np.asarray(config["trained_betas"], np.float64)
        else:
            ends = {"start": get("beta_start", 0.0001), "end": get("beta_end", 0.02)}
            steps = betas(config["beta_schedule"], get("num_train_timesteps", 1000), **ends)
        bars: Array = snr_shifted(np.cumprod(1 - steps, dtype=np.float64), get("snr_shift_scale", 1.0))
        return cls(prediction, zero_terminal_snr(bars) if get("rescale_betas_zero_snr") else bars)

    @classmethod
    def _flow_of(cls, config: Config) -> Process:
        get = config.get
        shift = get("flow_shift") if get("use_flow_sigmas") else get("shift")
        if shift is None:
            if (name := get("_class_name")) is not None:
                raise UsageError(
                    f"process: {name} says neither beta_schedule nor shift, so no solver here knows its levels; "
                    "SolverTable.from_scheduler takes the scheduler itself"
                )
            raise UsageError(
                "process: neither beta_schedule nor shift is in what was given; "
                "give a model's specification or the configuration of a diffusers scheduler"
            )
        dynamic = None
        if get("use_dynamic_shifting") or get("mu") is not None:
            dynamic = DynamicShift(
                get("base_shift", 0.5),
                get("max_shift", 1.15),
                get("base_image_seq_len", 256),
                get("max_image_seq_len", 4096),
                get("time_shift_type", "exponential"),
                get("mu"),
            )
        return cls.flow(
            shift,
            prediction=get("prediction_type", "flow_prediction"),
            train_steps=get("num_train_timesteps", 1000),
            inverted=bool(get("invert_sigmas")),
            dynamic=dynamic,
        )
