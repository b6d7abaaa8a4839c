"""What a diffusers scheduler's configuration means here: a solver of the catalog with its hook on x0, and a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.passes.solvers.catalog import Request, default, parse
from hasten.passes.solvers.config_keys import choice
from hasten.passes.solvers.configuration import SOLVER, Config, completed, configuration, says_how_to_sample
from hasten.passes.solvers.hooks import Hook
from hasten.passes.solvers.process import Process

FORMS = {"dpmsolver++": "data", "dpmsolver": "noise", "sde-dpmsolver++": "sde-data", "sde-dpmsolver": "sde-noise"}
SLOPES, VARIANTS, LOGRHO = ("midpoint", "heun"), ("bh1", "bh2"), ("logrho",)
"""What ``solver_type`` may be: of DPM-Solver, of UniPC, of DEIS."""


@dataclass(frozen=True)
class Read:
    """What was read: ``request.build(process, steps)`` is the table, which has ``hook``."""

    request: Request
    process: Process

    @property
    def hook(self) -> Hook | None:
        """What happens to the predicted x0."""
        return self.request.hook


def read_config(config: Any, solver: str | None = None) -> Read:
    """Read a scheduler or its configuration: ``_class_name`` and the options of that class, or its defaults.

    ``solver`` is a request for the catalog to take instead of the class's own; the process remains that of the
    configuration, whose class need not be one that there is a solver for, and so does the hook unless the request has
    one. `UsageError` otherwise.
    """
    config = configuration(config, "scheduler")
    if solver is None:
        _check_class(config)
    name = str(config.get("_class_name", "configuration"))
    if config.get("variance_type") in ("learned", "learned_range"):
        raise UsageError(
            f"{name}: the network predicts a variance too (variance_type={config['variance_type']!r}), which the loop "
            "does not split off; give a network whose output is the prediction alone"
        )
    return Read(own(config) if solver is None else hooked(parse(solver), config), Process.of(config))


def _check_class(config: Config) -> None:
    """Refuse a configuration that does not say which solver is meant."""
    if "_class_name" not in config:
        raise UsageError(
            "the configuration does not say whose it is (_class_name); give the scheduler itself, or name a solver"
        )
    if (name := str(config["_class_name"])) not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UsageError(
            f"no solver for diffusers' {name}; there are {known}.{nearest(name, _CLASSES)} Or name a solver to take "
            "instead"
        )


def own(config: Config) -> Request:
    """The solver and the hook of a configuration, whose class must be one of `CLASSES`."""
    full = completed(config)
    return hooked(parse(_CLASSES[full["_class_name"]](full)), config)


def hooked(request: Request, config: Config) -> Request:
    """``request`` with the hook of a configuration, unless it says what happens to x0 itself (``clip=inf``: nothing).

    `UsageError` for a solver that cannot have the hook, or does not know the configuration's schedule.
    """
    full = completed(config)
    if full.get("_class_name") == "IPNDMScheduler" and request.name != "ipndm":
        raise UsageError(
            f"an IPNDMScheduler's network is told the angles of a schedule of its own, and {request.name} does not "
            "know it; take ipndm"
        )
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

    Where it is None, what a `hasten.Scheduler` was made with, or that of ``config`` if it is a scheduler's, whose class
    must then be one of `CLASSES`; else, where it says what the network was trained on and no more, the plain one of
    ``process``.
    """
    text = config.get(SOLVER) if text is None else text
    if text is not None:
        return hooked(parse(text), config)
    if "_class_name" not in config and not says_how_to_sample(config):
        return hooked(parse(default(process)), config)
    _check_class(config)
    return own(config)


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
            _check_ends(config, name)
            return {"levels": name}
    return {"levels": "lu"} if config.get("use_lu_lambdas") else {}


def _check_ends(config: Config, levels: str) -> None:
    """Refuse levels between ends of their own: those here lie between the ends of the training's."""
    for key in ("sigma_min", "sigma_max"):
        if config.get(key) is not None:
            raise UsageError(
                f"{config['_class_name']}: {key}={config[key]:g} moves the ends of {levels} levels, which has no "
                "option here; name a solver with the levels themselves (sigmas=…), or take SolverTable.from_scheduler, "
                "which takes the scheduler itself"
            )


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
    form = choice(config, "algorithm_type", tuple(FORMS), ("deis",), otherwise="dpmsolver++")
    return {
        "order": config["solver_order"],
        "form": FORMS[form],
        "slope": choice(config, "solver_type", SLOPES, VARIANTS + LOGRHO, otherwise="midpoint"),
        "lower_order_final": config["lower_order_final"],
        "end": config["final_sigmas_type"],
        "least_log_snr": None if str(clipped) == "-inf" else clipped,
    }


def _unipc(config: Config) -> str:
    return _text(
        "unipc",
        order=config["solver_order"],
        variant=choice(config, "solver_type", VARIANTS, SLOPES + LOGRHO, otherwise="bh2"),
        form="data" if config["predict_x0"] else "noise",
        lower_order_final=config["lower_order_final"],
        disable_corrector=config["disable_corrector"] or None,
        end=config["final_sigmas_type"],
        terminal=config.get("shift_terminal"),
        **_spacing(config),
        **_levels(config),
    )


def _deis(config: Config) -> str:
    choice(config, "algorithm_type", ("deis",), ("dpmsolver", "dpmsolver++"), otherwise="deis")
    choice(config, "solver_type", LOGRHO, SLOPES + VARIANTS, otherwise="logrho")
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
        terminal=config.get("shift_terminal"),
        **_levels(config),
    )


_CLASSES: Mapping[str, Callable[[Config], str]] = {
    "DDIMScheduler": _ddim,
    "PNDMScheduler": _pndm,
    "IPNDMScheduler": lambda config: "ipndm",
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "LMSDiscreteScheduler": _karras("lms"),
    "EulerDiscreteScheduler": _karras("euler"),
    "EulerAncestralDiscreteScheduler": _karras("euler-ancestral"),
    "HeunDiscreteScheduler": _karras("heun"),
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": lambda config: "heun",
}
"""Every class that is read, and how its options are said in the catalog."""

CLASSES = tuple(_CLASSES)
"""The diffusers classes that are read."""
