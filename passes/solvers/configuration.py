"""A diffusers scheduler's configuration: whose it is, the types of its values, and what its class takes by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hasten.errors import UsageError
from hasten.passes.steps.options import Option

Config = Mapping[str, Any]


def _flag(meaning: str) -> Option:
    return Option("flag", meaning)


PROCESS: Mapping[str, Option] = {
    "num_train_timesteps": Option("integer", "the training's times", low=1),
    "beta_start": Option("number", "the first variance of the schedule", low=0, high=1),
    "beta_end": Option("number", "the last variance of the schedule", low=0, high=1),
    "beta_schedule": Option("text", "the schedule's name"),
    "trained_betas": Option("numbers", "all variances of the schedule", low=0, high=1),
    "prediction_type": Option("text", "what the network predicts"),
    "rescale_betas_zero_snr": _flag("whether the last training time has no signal"),
    "snr_shift_scale": Option("number", "what the signal-to-noise ratio is divided by", low=1e-6),
    "timestep_type": Option("text", "what the network is told"),
    "shift": Option("number", "how far a flow's levels are moved", low=1e-6),
    "flow_shift": Option("number", "how far a flow's levels are moved", low=1e-6),
    "use_flow_sigmas": _flag("whether this is a flow"),
    "invert_sigmas": _flag("whether the network is told 1 - s and predicts x0 - eps"),
    "use_dynamic_shifting": _flag("whether the shift depends on the picture's size"),
    "base_shift": Option("number", "mu at base_image_seq_len"),
    "max_shift": Option("number", "mu at max_image_seq_len"),
    "base_image_seq_len": Option("integer", "image tokens of a small picture", low=1),
    "max_image_seq_len": Option("integer", "image tokens of a large picture", low=1),
    "time_shift_type": Option("text", "what mu means", choices=("exponential", "linear")),
    "mu": Option("number", "how far a flow's levels are moved"),
}
"""Options of diffusers' schedulers that say what a network was trained on; ``mu`` is of this package."""

X0: Mapping[str, Option] = {
    "clip_sample": _flag("whether x0 is clipped"),
    "clip_sample_range": Option("number", "the largest x0", low=0),
    "thresholding": _flag("whether x0 is thresholded"),
    "dynamic_thresholding_ratio": Option("number", "the quantile that x0 is kept in", low=0, high=1),
    "sample_max_value": Option("number", "the most that the threshold lets through"),
    "variance_type": Option("text", "which variance a step draws"),
}
"""Options that say what happens to the network's prediction."""

SAMPLER: Mapping[str, Option] = {
    "timestep_spacing": Option("text", "how times are spread"),
    "steps_offset": Option("integer", "added to the leading grid", low=0),
    "solver_order": Option("integer", "the method's order"),
    "solver_type": Option("text", "the method's variant"),
    "algorithm_type": Option("text", "which integral"),
    "final_sigmas_type": Option("text", "where the last step goes"),
    "interpolation_type": Option("text", "how levels are interpolated"),
    "lambda_min_clipped": Option("number", "times with a lower log-SNR are left out"),
    "shift_terminal": Option("number", "a flow's last level before the end", low=0, high=1),
    "disable_corrector": Option("integers", "steps that are not corrected"),
    "set_alpha_to_one": _flag("whether the last step goes to no noise"),
    "skip_prk_steps": _flag("whether Runge-Kutta steps are left out"),
    "euler_at_final": _flag("whether the last step is of order 1"),
    "lower_order_final": _flag("whether the last steps are of lower order"),
    "predict_x0": _flag("whether x0 is integrated"),
    "stochastic_sampling": _flag("whether steps draw fresh noise"),
    "sigma_min": Option("number", "the last of levels other than the training's", low=0),
    "sigma_max": Option("number", "the first of levels other than the training's", low=0),
    "use_karras_sigmas": _flag("whether levels are Karras'"),
    "use_exponential_sigmas": _flag("whether levels are exponential"),
    "use_beta_sigmas": _flag("whether levels are quantiles of a beta distribution"),
    "use_lu_lambdas": _flag("whether levels are even in log-SNR"),
}
"""Options that say how diffusers' schedulers sample: what is read of them here."""

SOLVER = "_hasten_solver"
"""The key of `hasten.Scheduler` for a solver other than the class's own; diffusers passes over keys with a ``_``."""

_KNOWN = {
    "_class_name": Option("text", "the scheduler's class"),
    SOLVER: Option("text", "a solver"),
    **PROCESS,
    **X0,
    **SAMPLER,
}
_NEEDED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "shift")
"""What is no number or word where it is null; null elsewhere stands for the class's default."""

_TIMES = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_LEADING, _LINSPACE = {**_TIMES, "timestep_spacing": "leading"}, {**_TIMES, "timestep_spacing": "linspace"}
_LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_ORDERS = {**_LINSPACE, "solver_order": 2, "lower_order_final": True, "flow_shift": 1.0}
_DPM = {
    **_ORDERS,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}
_UNIPC = {
    **_ORDERS,
    "solver_type": "bh2",
    "predict_x0": True,
    "disable_corrector": (),
    "final_sigmas_type": "zero",
}
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0}
_COGVIDEOX = {**_LEADING, **_LATENT, "snr_shift_scale": 3.0, "set_alpha_to_one": True}

DEFAULTS: Mapping[str, Config] = {
    "DDIMScheduler": {**_LEADING, "set_alpha_to_one": True, "clip_sample": True},
    "PNDMScheduler": {**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False},
    "IPNDMScheduler": {**_LINSPACE, "prediction_type": "v_prediction"},
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": {**_DPM, "lower_order_final": False},
    "UniPCMultistepScheduler": _UNIPC,
    "DEISMultistepScheduler": _ORDERS,
    "LMSDiscreteScheduler": _LINSPACE,
    "EulerDiscreteScheduler": {**_LINSPACE, "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "HeunDiscreteScheduler": {**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012},
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "CogVideoXDDIMScheduler": _COGVIDEOX,
    "CogVideoXDPMScheduler": _COGVIDEOX,
}
"""What diffusers' classes take where a configuration does not say, as far as it matters here."""


def configuration(given: Any, where: str = "process") -> dict[str, Any]:
    """The configuration ``given``, or that of the diffusers scheduler ``given``, with its class and with plain values.

    ``where`` begins the message of a `UsageError`, which names a value of a wrong type or out of its range.
    """
    config = getattr(given, "config", given)
    if not isinstance(config, Mapping):
        raise UsageError(
            f"{where}: expected a diffusers scheduler or its configuration (scheduler.config, or what "
            f"scheduler_config.json holds), found {type(given).__name__}"
        )
    read = {}
    for key, value in config.items():
        plain = value.tolist() if hasattr(value, "tolist") else value  # arrays, and numbers of them
        known = _KNOWN.get(key)
        empty = plain is None or (isinstance(plain, (list, tuple)) and not plain)
        if known is not None and (not empty or key in _NEEDED):
            plain = _read(known, f"{where}: {key}", plain)
        read[key] = plain
    if hasattr(given, "request"):  # hasten.Scheduler, which goes by the name of the class that it replaces
        return read if given.solver is None else {**read, SOLVER: given.solver}
    if config is not given:
        read.setdefault("_class_name", type(given).__name__)
    return read


def _read(option: Option, where: str, value: Any) -> Any:
    """A value in its option's type; a list is one here, and no text with strokes between."""
    if option.kind not in ("numbers", "integers"):
        return option.read(where, value)
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{where}: {value!r} is not a list of numbers ({option.meaning})")
    each = replace(option, kind=option.kind.removesuffix("s"))
    return [each.read(where, item) for item in value]


def completed(config: Config) -> dict[str, Any]:
    """``config`` with the defaults of its class where it says nothing or null."""
    defaults = DEFAULTS.get(str(config.get("_class_name")), {})
    return {**defaults, **{key: value for key, value in config.items() if value is not None}}


def says_how_to_sample(config: Config) -> bool:
    """Whether a configuration is that of a scheduler, and not of a process alone."""
    return any(key in SAMPLER or key == "_use_default_values" for key in config)
