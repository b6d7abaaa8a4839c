"""The catalog's entries: the options of every solver, and how they choose its grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hasten.errors import UsageError
from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.catalog import X0, Entry, parse
from hasten.passes.solvers.classifier_guidance import classifier_guided
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.deis import deis
from hasten.passes.solvers.diffusion_grid import DPM as DPM_LEVELS
from hasten.passes.solvers.diffusion_grid import ENDS, Convention, diffusion_grid
from hasten.passes.solvers.diffusion_grid import KARRAS as KARRAS_LEVELS
from hasten.passes.solvers.diffusion_grid import UNIPC as UNIPC_LEVELS
from hasten.passes.solvers.dpm_singlestep import dpm_singlestep
from hasten.passes.solvers.dpm_solver import FORMS, SLOPES, dpm_solver
from hasten.passes.solvers.dynamic_shift import TIME_SHIFTS, moved
from hasten.passes.solvers.euler import ancestral, euler, lms
from hasten.passes.solvers.flow_euler import flow_euler, inverted
from hasten.passes.solvers.flow_grid import SPACINGS as FLOW_SPACINGS
from hasten.passes.solvers.flow_grid import flow_grid
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.heun import heun
from hasten.passes.solvers.ipndm import ipndm
from hasten.passes.solvers.levels import LEVELS
from hasten.passes.solvers.pndm import plms, pndm
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.schedule import SPACINGS
from hasten.passes.solvers.splitting import ltsp, stsp
from hasten.passes.solvers.table import SolverTable
from hasten.passes.solvers.unipc import VARIANTS, unipc
from hasten.passes.steps.options import Option

COMPAT = Option(
    "text",
    "diffusers: its results, with its differences; none: as published",
    "diffusers",
    choices=("diffusers", "none"),
)
LOWER_ORDER_FINAL = Option("flag", "whether the last steps are of lower order", True)
TIMES = {
    "offset": Option("integer", "added to the leading grid (diffusers: steps_offset)", 0, low=0),
    "times": Option("numbers", "the caller's own times, descending, one a step"),
}
FLOW = {
    "shift": Option(
        "number", "how far a flow's levels are moved to the noisy end; the model's own unless given", low=1e-6
    ),
    "mu": Option("number", "a flow's dynamic shift: shift = e^mu"),
    "tokens": Option("integer", "image tokens, from which a dynamic shift is found: mu is not given then", low=1),
    "time_shift": Option("text", "what mu means; as the model's own unless given", choices=TIME_SHIFTS),
    "terminal": Option(
        "number", "a flow's last level before the end, to which the others are stretched", low=0, high=1
    ),
    "invert": Option("flag", "whether a flow's network is told 1 - s and predicts x0 - eps", False),
}
GRID = {
    "spacing": Option("text", "how times are spread", "linspace", choices=SPACINGS),
    "levels": Option(
        "text", "the training's own noise levels, or others between the same ends", "model", choices=LEVELS
    ),
    "end": Option("text", "where the last step goes: no noise, or the training's least", "zero", choices=ENDS),
    **TIMES,
    "sigmas": Option("numbers", "the caller's own noise-to-signal ratios, or levels of a flow; descending, one a step"),
    **FLOW,
}


RARE = {
    "least_log_snr": Option(
        "number", "times with a lower log-SNR are left out (diffusers: lambda_min_clipped)", -math.inf
    ),
    "rounding": Option("text", "of times told with levels other than the model's", choices=("round", "down")),
}
"""Of DPM-Solver's grid alone."""


def order(highest: int, default: int) -> Option:
    """The option that chooses a method's order."""
    return Option("integer", "the method's order", default, low=1, high=highest)


def _grid(convention: Convention, start: str) -> Callable[..., Grid]:
    """How a family of solvers reads the options in `GRID`."""

    def make(process: Process, steps: int, **options: Any) -> Grid:
        shared = {key: options[key] for key in ("levels", "end", "times", "compat")}
        if process.bars is not None:
            refused = [key for key in FLOW if options[key] != FLOW[key].default]
            if refused:
                raise UsageError(
                    f"option {refused[0]} is for flows, and this model is a diffusion process; leave it out"
                )
            more = {key: options[key] for key in ("spacing", "offset", "least_log_snr", "rounding") if key in options}
            return diffusion_grid(
                steps, process.bars, convention=convention, ratios=options["sigmas"], **shared, **more
            )
        return flow_grid(
            steps,
            start=start,
            sigmas=options["sigmas"],
            terminal=options["terminal"],
            train_steps=process.train_steps,
            **moved(process.dynamic, process.shift, options),
            **shared,
        )

    return make


DPM_GRID, UNIPC_GRID = _grid(DPM_LEVELS, "below"), _grid(UNIPC_LEVELS, "almost")
DEIS_GRID, KARRAS_GRID = _grid(UNIPC_LEVELS, "below"), _grid(KARRAS_LEVELS, "one")


def _entry(
    summary: str,
    solver: Callable[..., SolverTable],
    grid: Callable[..., Grid],
    options: Mapping[str, Option],
    *,
    takes_compat: bool = True,
    without: tuple[str, ...] = (),
    starts_late: bool = True,
    hooked: bool = True,
    **defaults: Any,
) -> Entry:
    """An entry for a solver that works on a grid; ``defaults`` are of the grid's options that it sets itself."""

    def build(process: Process, steps: int, first: int = 0, **given: Any) -> SolverTable:
        given["compat"] = None if given["compat"] == "none" else given["compat"]
        places = {key: given.get(key, option.default) for key, option in GRID.items()} | defaults
        places |= {key: given[key] for key in options if key in RARE}
        chosen = {key: given[key] for key in options if key not in RARE}
        if takes_compat:
            chosen["compat"] = given["compat"]
        made = replace(grid(process, steps, compat=given["compat"], **places), first=first)
        table = solver(made, prediction=process.prediction, **chosen)
        return inverted(table, process.train_steps) if process.inverted or places["invert"] else table

    kept = {key: option for key, option in GRID.items() if key not in without}
    return Entry(summary, {**options, **kept, **(X0 if hooked else {}), "compat": COMPAT}, build, starts_late)


def _of_times(
    summary: str,
    solver: Callable[..., SolverTable],
    options: Mapping[str, Option],
    end: str,
    instead: str,
    starts_late: bool = False,
) -> Entry:
    """An entry for a solver on the training's own times, which has no meaning for a flow."""

    def build(process: Process, steps: int, **given: Any) -> SolverTable:
        if process.bars is None:
            raise UsageError(f"{solver.__name__} is for diffusion processes, and this model is a flow; take {instead}")
        given["compat"] = None if given["compat"] == "none" else given["compat"]
        given["set_alpha_to_one"] = given.pop("end") == "zero"
        return solver(steps, process.bars, prediction=process.prediction, **given)

    places = {
        "spacing": Option("text", "how times are spread", "leading", choices=SPACINGS),
        "end": Option("text", "where the last step goes: no noise, or the training's least", end, choices=ENDS),
        **TIMES,
    }
    return Entry(summary, {**options, **places, **X0, "compat": COMPAT}, build, starts_late)


def _ddim(steps: int, bars: Any, **options: Any) -> SolverTable:
    return ddim(steps, schedule=bars, **options)


_ddim.__name__ = "ddim"


def _ipndm(process: Process, steps: int, *, compat: str) -> SolverTable:
    if process.prediction != "v_prediction" or process.is_flow:
        raise UsageError("ipndm is for networks that predict v on its own sine schedule; take plms")
    return ipndm(steps, compat=None if compat == "none" else compat)


def _flow_euler(process: Process, steps: int, **given: Any) -> SolverTable:
    if not process.is_flow:
        raise UsageError("flow-euler is for flows, and this model is a diffusion process; take euler or ddim")
    given["compat"] = None if given["compat"] == "none" else given["compat"]
    given |= moved(process.dynamic, process.shift, given)
    given["invert"] = given["invert"] or process.inverted
    del given["tokens"]
    return flow_euler(steps, prediction=process.prediction, train_steps=process.train_steps, **given)


def _guided(process: Process, steps: int, *, solver: str, weight: float) -> SolverTable:
    name, _, options = solver.partition(":")
    inner = parse(f"{name}:{options.replace('/', ',')}")
    return classifier_guided(inner.build(process, steps), process, weight)


DPM_OPTIONS = {
    "order": order(3, 2),
    "form": Option("text", "which integral: of x0, of eps, or either with fresh noise", "data", choices=FORMS),
    "slope": Option("text", "how order 2 weighs the derivative", "midpoint", choices=SLOPES),
}
DDIM = _of_times(
    "Song et al.: one latent, any step",
    _ddim,
    {
        "eta": Option("number", "fresh noise: 0 none, 1 as in DDPM", 0.0, low=0),
        "keep_eps": Option("flag", "whether a hook on x0 leaves eps as it is", False),
    },
    "zero",
    "flow-euler, which is the same method",
)
PLMS = _of_times(
    "Liu et al.: Adams-Bashforth after one step of improved Euler", plms, {}, "sigma_min", "lms", starts_late=True
)
PNDM = _of_times("Liu et al.: Adams-Bashforth after three steps of Runge-Kutta", pndm, {}, "sigma_min", "lms")
IPNDM = Entry("Zhang & Chen: Adams-Bashforth on a sine schedule", {"compat": COMPAT}, _ipndm)
DPM_SOLVER = _entry(
    "Lu et al.: exponential integrator with history",
    dpm_solver,
    DPM_GRID,
    {
        **DPM_OPTIONS,
        "lower_order_final": LOWER_ORDER_FINAL,
        "euler_at_final": Option("flag", "whether the last step is of order 1", False),
        **RARE,
    },
)
DPM_SINGLESTEP = _entry(
    "Lu et al.: exponential integrator with stages",
    dpm_singlestep,
    DPM_GRID,
    {**DPM_OPTIONS, "lower_order_final": Option("flag", "whether the last step is of order 1", False), **RARE},
)
UNIPC = _entry(
    "Zhao et al.: predictor and corrector",
    unipc,
    UNIPC_GRID,
    {
        "order": order(3, 2),
        "variant": Option("text", "the function B(h)", "bh2", choices=VARIANTS),
        "form": Option("text", "which integral: of x0 or of eps", "data", choices=("data", "noise")),
        "lower_order_final": LOWER_ORDER_FINAL,
        "disable_corrector": Option("integers", "steps that are not corrected, from 0"),
    },
)
DEIS = _entry(
    "Zhang & Chen: eps as a polynomial in the logarithm of the noise level",
    deis,
    DEIS_GRID,
    {"order": order(3, 2), "lower_order_final": LOWER_ORDER_FINAL},
    without=("end",),
    end="sigma_min",
)
LMS = _entry("Adams-Bashforth on uneven noise levels", lms, KARRAS_GRID, {"order": order(6, 4)})
EULER = _entry("Karras et al.: Euler's method", euler, KARRAS_GRID, {}, takes_compat=False)
ANCESTRAL = _entry("Euler's method with fresh noise", ancestral, KARRAS_GRID, {}, takes_compat=False)
HEUN = _entry("Karras et al.: Heun's method", heun, KARRAS_GRID, {}, takes_compat=False, starts_late=False)
SPLITTING = {
    "order": order(4, 4),
    "weight": Option("number", "how much the guide weighs", 1.0),
}
_SPLIT: dict[str, Any] = {"takes_compat": False, "starts_late": False, "hooked": False}
LTSP = _entry("Wizadwongsa & Suwajanakorn: denoiser, then guide", ltsp, KARRAS_GRID, SPLITTING, **_SPLIT)
STSP = _entry("the same: half of the guide, denoiser, half", stsp, KARRAS_GRID, SPLITTING, **_SPLIT)
GUIDED = Entry(
    "Dhariwal & Nichol: any solver of one network, whose eps a guide moves",
    {
        "solver": Option("text", "which: NAME, or NAME:OPTION=VALUE/OPTION=VALUE", "ddim:spacing=trailing/compat=none"),
        "weight": SPLITTING["weight"],
    },
    _guided,
)
CAF = Entry(
    "Park et al.: a network for the velocity, asked once, and one for the acceleration",
    {
        "inverse": Option("flag", "from data to noise", False),
        "fraction": Option("integer", "times are told in whole parts of 1 / fraction", low=1),
    },
    lambda process, steps, **options: caf(steps, **options),
)
FLOW_EULER = Entry(
    "Euler's method for rectified flow",
    {
        "stochastic": Option("flag", "whether steps draw fresh noise", False),
        "spacing": Option(
            "text",
            "how levels are spread: to the last training time, or in equal steps to the end",
            "linspace",
            choices=FLOW_SPACINGS,
        ),
        "levels": GRID["levels"],
        "sigmas": GRID["sigmas"],
        "times": GRID["times"],
        **FLOW,
        **X0,
        "compat": COMPAT,
    },
    _flow_euler,
)
