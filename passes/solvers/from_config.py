"""What a diffusers scheduler's configuration means here: a solver of the catalog with its hook on x0, and a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.passes.solvers.catalog import Request, default, parse
from hasten.passes.solvers.hooks import Hook
from hasten.passes.solvers.process import Process

Config = Mapping[str, Any]
FORMS = {"dpmsolver++": "data", "dpmsolver": "noise", "sde-dpmsolver++": "sde-data", "sde-dpmsolver": "sde-noise"}


@dataclass(frozen=True)
class Read:
    """What was read: ``request.build(process, steps)`` is the table, which has ``hook``."""

    request: Request
    process: Process

    @property
    def hook(self) -> Hook | None:
        """What happens to the predicted x0."""
        return self.request.hook


def read_config(config: Config, solver: str | None = None) -> Read:
    """Read a configuration: ``_class_name`` and the options of that class, with its defaults where they are missing.

    ``solver`` is a request for the catalog to take instead of the class's own; the process remains that of the
    configuration, whose class need not be one that there is a solver for, and so does the hook unless the request has
    one. `UsageError` otherwise.
    """
    name = str(config.get("_class_name", "configuration"))
    if name not in _CLASSES and solver is None:
        if "_class_name" not in config:
            raise UsageError(
                "the configuration does not say whose it is (_class_name); give the scheduler itself, or name a solver"
            )
        known = ", ".join(_CLASSES)
        raise UsageError(f"no solver for diffusers' {name}; there are {known}.{nearest(name, _CLASSES)}")
    if config.get("variance_type") in ("learned", "learned_range"):
        raise UsageError(
            f"{name}: the network predicts a variance too (variance_type={config['variance_type']!r}), which the loop "
            "does not split off; give a network whose output is the prediction alone"
        )
    full = _full(config)
    return Read(own(config) if solver is None else hooked(parse(solver), config), Process.of(full))


def own(config: Config) -> Request:
    """The solver and the hook of a configuration, whose class must be one of `CLASSES`."""
    full = _full(config)
    return hooked(parse(_CLASSES[full["_class_name"]][1](full)), config)


def hooked(request: Request, config: Config) -> Request:
    """``request`` with the hook of a configuration, unless it says what happens to x0 itself (``clip=inf``: nothing).

    `UsageError` for a solver that cannot have the hook.
    """
    full = _full(config)
    if full.get("thresholding"):
        ratio, largest = full.get("dynamic_thresholding_ratio", 0.995), full.get("sample_max_value", 1.0)
        what, given = "thresholds", {"threshold": ratio, "largest": largest}
    elif full.get("clip_sample"):
        what, given = "clips", {"clip": full.get("clip_sample_range", 1.0)}
    else:
        return request
    if "clip" not in request.options:
        raise UsageError(
            f"the scheduler's configuration {what} x0, which {request.name} cannot; take another solver, or set "
            f"{'thresholding' if what == 'thresholds' else 'clip_sample'} to false in it"
        )
    if any(request.options[key] is not None for key in ("clip", "threshold")):
        return request
    return request.with_options(**given)


def requested(text: str | None, config: Config, process: Process) -> Request:
    """The solver that ``text`` asks for, with the hook that ``config`` adds.

    Where it is None, that of ``config`` if it is a configuration of `CLASSES`, else the plain one of ``process``.
    """
    if text is None and config.get("_class_name") in _CLASSES:
        return own(config)
    return hooked(parse(text or default(process)), config)


def _full(config: Config) -> Config:
    defaults, _ = _CLASSES.get(str(config.get("_class_name")), ({}, None))
    return {**defaults, **{key: value for key, value in config.items() if value is not None}}


def _text(name: str, **options: Any) -> str:
    given = [f"{key}={_word(value)}" for key, value in options.items() if value is not None]
    return f"{name}:{','.join(given)}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _spacing(config: Config) -> dict[str, Any]:
    return {"spacing": config["timestep_spacing"], "offset": config.get("steps_offset", 0)}


def _levels(config: Config) -> dict[str, Any]:
    for name in ("karras", "exponential", "beta"):
        if config.get(f"use_{name}_sigmas"):
            return {"levels": name}
    return {"levels": "lu"} if config.get("use_lu_lambdas") else {}


def _ddim(config: Config) -> str:
    end = "zero" if config["set_alpha_to_one"] else "sigma_min"
    hooked = config.get("clip_sample") or config.get("thresholding")
    return _text("ddim", **_spacing(config), end=end, keep_eps=True if hooked else None)


def _pndm(config: Config) -> str:
    name = "plms" if config["skip_prk_steps"] else "pndm"
    return _text(name, **_spacing(config), end="zero" if config["set_alpha_to_one"] else "sigma_min")


def _dpm(config: Config) -> str:
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    levels = _levels(config)
    return _text(
        "dpm-solver",
        **_dpm_options(config),
        **_spacing(config),
        **levels,
        euler_at_final=config["euler_at_final"],
        rounding="down" if cosine and levels else None,
    )


def _singlestep(config: Config) -> str:
    return _text("dpm-singlestep", **_dpm_options(config), **_levels(config))


def _dpm_options(config: Config) -> dict[str, Any]:
    clipped = config.get("lambda_min_clipped", "-inf")
    slope = config["solver_type"]
    return {
        "order": config["solver_order"],
        "form": FORMS.get(config["algorithm_type"], "data"),
        "slope": slope if slope in ("midpoint", "heun") else "midpoint",
        "lower_order_final": config["lower_order_final"],
        "end": config["final_sigmas_type"],
        "least_log_snr": None if str(clipped) == "-inf" else clipped,
    }


def _unipc(config: Config) -> str:
    variant = config["solver_type"]
    return _text(
        "unipc",
        order=config["solver_order"],
        variant=variant if variant in ("bh1", "bh2") else "bh2",
        form="data" if config["predict_x0"] else "noise",
        lower_order_final=config["lower_order_final"],
        disable_corrector=config["disable_corrector"] or None,
        end=config["final_sigmas_type"],
        terminal=config.get("shift_terminal"),
        **_spacing(config),
        **_levels(config),
    )


def _deis(config: Config) -> str:
    return _text(
        "deis",
        order=config["solver_order"],
        lower_order_final=config["lower_order_final"],
        **_spacing(config),
        **_levels(config),
    )


def _karras(name: str) -> Callable[[Config], str]:
    def describe(config: Config) -> str:
        if (
            config.get("timestep_type", "discrete") != "discrete"
            or config.get("interpolation_type", "linear") != "linear"
        ):
            raise UsageError(
                f"{config['_class_name']}: timestep_type={config.get('timestep_type')!r} with "
                f"interpolation_type={config.get('interpolation_type')!r} has no grid here; "
                "SolverTable.from_scheduler takes the scheduler itself"
            )
        end = {"end": config["final_sigmas_type"]} if "final_sigmas_type" in config else {}
        return _text(name, **_spacing(config), **_levels(config), **end)

    return describe


def _flow_euler(config: Config) -> str:
    return _text(
        "flow-euler",
        stochastic=config.get("stochastic_sampling", False),
        invert=config.get("invert_sigmas", False),
        terminal=config.get("shift_terminal"),
        time_shift=config.get("time_shift_type", "exponential"),
        **_levels(config),
    )


_TIMES = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon", "steps_offset": 0}
_LEADING, _LINSPACE = {**_TIMES, "timestep_spacing": "leading"}, {**_TIMES, "timestep_spacing": "linspace"}
_ORDERS = {**_LINSPACE, "solver_order": 2, "lower_order_final": True}
_DPM = {
    **_ORDERS,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0}

_CLASSES: Mapping[str, tuple[Config, Callable[[Config], str]]] = {
    "DDIMScheduler": ({**_LEADING, "set_alpha_to_one": True, "clip_sample": True}, _ddim),
    "PNDMScheduler": ({**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False}, _pndm),
    "IPNDMScheduler": ({**_LINSPACE, "prediction_type": "v_prediction"}, lambda config: "ipndm"),
    "DPMSolverMultistepScheduler": (_DPM, _dpm),
    "DPMSolverSinglestepScheduler": ({**_DPM, "lower_order_final": False}, _singlestep),
    "UniPCMultistepScheduler": (
        {**_ORDERS, "solver_type": "bh2", "predict_x0": True, "disable_corrector": (), "final_sigmas_type": "zero"},
        _unipc,
    ),
    "DEISMultistepScheduler": (_ORDERS, _deis),
    "LMSDiscreteScheduler": (_LINSPACE, _karras("lms")),
    "EulerDiscreteScheduler": ({**_LINSPACE, "final_sigmas_type": "zero"}, _karras("euler")),
    "EulerAncestralDiscreteScheduler": (_LINSPACE, _karras("euler-ancestral")),
    "HeunDiscreteScheduler": ({**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012}, _karras("heun")),
    "FlowMatchEulerDiscreteScheduler": (_FLOW, _flow_euler),
    "FlowMatchHeunDiscreteScheduler": (_FLOW, lambda config: "heun"),
}
"""Every class that is read: its defaults, where they matter here, and how its options are said in the catalog."""

CLASSES = tuple(_CLASSES)
"""The diffusers classes that are read."""
