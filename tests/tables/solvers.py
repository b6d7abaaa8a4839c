"""Solver tables against diffusers' schedulers: every class, spacing, prediction type and number of steps.

    python tests/tables/solvers.py [--only CLASS ...] [--stock] [--json]

A scheduler is driven with basis vectors in the place of noise and network outputs: what comes out is its response
matrix, which a table has too. It runs in float64: the float32 that its module makes is widened (--stock leaves it).
Prints one row a configuration: the largest difference relative to the largest coefficient, and what either side refuses
and why. Exit code 1 where they differ, or where only one of the two refuses. Beta levels and LMS need scipy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from hasten.errors import UsageError
from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.table import SolverTable

STEPS = (1, 2, 3, 4, 5, 7, 10, 14, 15, 30, 50)
FEW = (1, 2, 5, 14, 15)
"""For options beyond the spacing and the prediction type; 14 and 15 lie on both sides of lower_order_final's limit."""
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS: tuple[dict[str, Any], ...] = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
TOLERANCE, STOCK_TOLERANCE = 1e-12, 2e-5
LOOSER = {
    "rescale_betas_zero_snr=True": 1e-11,  # it makes betas of the rescaled alpha_bar, and alpha_bar of them again
    "IPNDMScheduler": 1e-8,  # it divides rounding errors by 1e-8 in its first step
    "DEISMultistepScheduler": 3e-12,  # its closed forms cancel where levels are close to each other
}
STOCK_LOOSER = {
    "DEISMultistepScheduler": 5e-4,  # differences of logarithms, and of antiderivatives
    "predict_x0=False": 1e-4,  # weights of order 3 divide what cancels by the length of the step, again and again
    "rescale_betas_zero_snr=True": 1e-4,  # 1 - alpha_bar where alpha_bar is 6e-8, and where it is 0.9999
}
"""What float32 costs diffusers beyond 2e-5; in float64 all of these agree as closely as the others."""
BETWEEN: dict[str, tuple[dict[str, Any], ...]] = {
    "DDIMScheduler": ({"clip_sample": False}, {"clip_sample": False, "set_alpha_to_one": False}),
    "PNDMScheduler": ({}, {"skip_prk_steps": True}, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "DPMSolverMultistepScheduler": (
        {},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "UniPCMultistepScheduler": ({}, {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    "DEISMultistepScheduler": ({}, {"solver_order": 3}),
    "LMSDiscreteScheduler": ({},),
    "EulerDiscreteScheduler": ({}, {"final_sigmas_type": "sigma_min"}),
    "EulerAncestralDiscreteScheduler": ({},),
    "HeunDiscreteScheduler": ({},),
}
"""Options that every spacing and prediction type meets, by class."""


@dataclass(frozen=True)
class Case:
    """One configuration of a class, and the numbers of steps that it is run with."""

    scheduler: str
    config: dict[str, Any]
    steps: tuple[int, ...] = STEPS

    def __str__(self) -> str:
        said = {k: v for k, v in self.config.items() if k not in STABLE_DIFFUSION}
        return f"{self.scheduler} " + (" ".join(f"{k}={v}" for k, v in said.items()) or "(defaults)")


@dataclass
class Row:
    """What came of a case. ``refused``: steps -> [diffusers' error or None, ours or None]."""

    case: str
    compared: int = 0
    largest: float = 0.0
    refused: dict[int, list[str | None]] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)


def cases() -> Iterator[Case]:
    """Every case: the product of spacing and prediction type, then what else the classes offer."""
    for name, variants in BETWEEN.items():
        for variant in variants:
            for spacing in SPACINGS:
                for prediction in PREDICTIONS:
                    yield Case(name, {**STABLE_DIFFUSION, **spacing, "prediction_type": prediction, **variant})
    for prediction in PREDICTIONS:
        yield Case("DPMSolverSinglestepScheduler", {**STABLE_DIFFUSION, "prediction_type": prediction})
    yield Case("IPNDMScheduler", {})
    yield from _options()
    yield from _levels()
    yield from _flows()


def _options() -> Iterator[Case]:
    """Orders, forms and ends of the exponential integrators."""
    ends = ({}, {"final_sigmas_type": "sigma_min"})
    for order in (1, 2, 3):
        for end in ends:
            base = {**STABLE_DIFFUSION, "solver_order": order, **end}
            for form in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"):
                for slope in ("midpoint", "heun"):
                    config = {**base, "algorithm_type": form, "solver_type": slope}
                    yield Case("DPMSolverMultistepScheduler", config, FEW)
                    if form != "sde-dpmsolver":
                        yield Case("DPMSolverSinglestepScheduler", config, (*FEW, 3, 4, 6, 7))
            for variant in ("bh1", "bh2"):
                for data in (True, False):
                    config = {**base, "solver_type": variant, "predict_x0": data}
                    yield Case("UniPCMultistepScheduler", config, FEW)
        yield Case("DEISMultistepScheduler", {**STABLE_DIFFUSION, "solver_order": order}, FEW)
    for config in ({"euler_at_final": True}, {"lower_order_final": False}, {"lambda_min_clipped": -5.1}):
        for end in ends:
            base = {"beta_schedule": "squaredcos_cap_v2", "solver_order": 3, **config, **end}
            yield Case("DPMSolverMultistepScheduler", base, FEW)
    for config in ({"disable_corrector": [0]}, {"disable_corrector": [0, 1, 2, 3]}, {"lower_order_final": False}):
        yield Case("UniPCMultistepScheduler", {**config, "final_sigmas_type": "sigma_min", "solver_order": 3}, FEW)
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"):
        yield Case(name, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, FEW)
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    yield Case("DDIMScheduler", {**zero, "clip_sample": False}, FEW)


def _levels() -> Iterator[Case]:
    """Levels that are not the training's."""
    names = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")
    for level in LEVELS:
        for name in (*names, "DEISMultistepScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"):
            for spacing in SPACINGS:
                yield Case(name, {**STABLE_DIFFUSION, **spacing, level: True}, FEW)
        for name in names:
            yield Case(name, {**STABLE_DIFFUSION, level: True, "final_sigmas_type": "sigma_min"}, FEW)
        yield Case("DPMSolverSinglestepScheduler", {**STABLE_DIFFUSION, level: True}, FEW)
        yield Case("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", level: True}, FEW)
    yield Case("DPMSolverMultistepScheduler", {**STABLE_DIFFUSION, "use_lu_lambdas": True}, STEPS[1:])


def _flows() -> Iterator[Case]:
    """Rectified flow."""
    for shift in (1.0, 3.0):
        yield Case("FlowMatchHeunDiscreteScheduler", {"shift": shift})
        for more in ({}, {"stochastic_sampling": True}, {"invert_sigmas": True}, {"shift_terminal": 0.1}):
            yield Case("FlowMatchEulerDiscreteScheduler", {"shift": shift, **more})
        for level in LEVELS:
            yield Case("FlowMatchEulerDiscreteScheduler", {"shift": shift, level: True}, FEW)
        for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"):
            config = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
            for order in (1, 2, 3):
                yield Case(f"{name}Scheduler", {**config, "solver_order": order}, FEW)
        config = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        yield Case("UniPCMultistepScheduler", {**config, "shift_terminal": 0.05}, FEW)


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return self._module.float64 if name == "float32" else getattr(self._module, name)


@contextlib.contextmanager
def widened(module: Any) -> Iterator[None]:
    """Let a scheduler's module compute in float64."""
    saved = {name: getattr(module, name) for name in ("torch", "np", "numpy") if hasattr(module, name)}
    default = torch.get_default_dtype()
    try:
        for name, original in saved.items():
            setattr(module, name, _Wide(original))
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        for name, original in saved.items():
            setattr(module, name, original)
        torch.set_default_dtype(default)


def probed(
    scheduler: str,
    config: dict[str, Any],
    steps: int,
    *,
    stock: bool = False,
    options: dict[str, Any] | None = None,
    begin: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The response matrix of a diffusers scheduler, (M + 1, 1 + 2 M): noise, outputs, fresh noise; and its timesteps.

    ``options`` go to every step. A run that begins late, as image-to-image does, is told of what the network sees first
    in the place of noise.
    """
    import diffusers

    kind = getattr(diffusers, scheduler)
    module = sys.modules[kind.__module__]
    with contextlib.nullcontext() if stock else widened(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = kind(**config)
        made.set_timesteps(steps)
        times = made.timesteps[begin:]
        count = len(times)
        basis = torch.eye(1 + 2 * count, dtype=torch.float64)[:, None]
        if stock:
            basis = basis.float()
        rows, x, drawn = [], basis[0] * float(getattr(made, "init_noise_sigma", 1.0)), iter(basis[1 + count :])
        if begin:
            if hasattr(made, "set_begin_index"):
                made.set_begin_index(begin)
            x = basis[0] / float(made.scale_model_input(basis[0], times[0])[0, 0]) if scales(made) else basis[0]
        noise = getattr(module, "randn_tensor", None)
        if noise is not None:
            module.randn_tensor = lambda *a, **k: next(drawn)
        try:
            for i, t in enumerate(times):
                rows.append(made.scale_model_input(x, t) if scales(made) else x)
                x = made.step(basis[1 + i], t, x, **(options or {})).prev_sample
        finally:
            if noise is not None:
                module.randn_tensor = noise
    return torch.cat([*rows, x]).double().numpy(), times.double().numpy()


def scales(scheduler: Any) -> bool:
    """Whether the network sees something else than the scheduler's sample; flows have no such method."""
    return hasattr(scheduler, "scale_model_input")


def without_unused_noise(matrix: np.ndarray, table: SolverTable) -> np.ndarray:
    """diffusers may draw noise for every step; a table numbers only the rows that use it."""
    count = len(table)
    unused = [1 + count + i for i in range(count) if i not in table.noisy]
    if np.abs(matrix[:, unused]).max(initial=0) > 1e-7:
        raise AssertionError("noise in a row that takes none")
    return np.delete(matrix, unused, axis=1)


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def measure(case: Case, *, stock: bool = False) -> Row:
    """Run both sides at every number of steps."""
    row = Row(str(case))
    known, least = (STOCK_LOOSER, STOCK_TOLERANCE) if stock else (LOOSER, TOLERANCE)
    said = (f"{key}={value}" for key, value in case.config.items())
    tolerance = max(known.get(key, least) for key in (case.scheduler, *said))
    for steps in case.steps:
        theirs = ours = None
        try:
            wanted, times = probed(case.scheduler, case.config, steps, stock=stock)
            theirs = None if np.isfinite(wanted).all() else "its result is not finite"
        except Exception as error:
            theirs = f"{type(error).__name__}: {error}"
        try:
            read = read_config({"_class_name": case.scheduler, **case.config})
            table = read.request.build(read.process, steps)
        except UsageError as error:
            ours = str(error)
        if theirs or ours:
            row.refused[steps] = [theirs, ours]
            continue
        error = difference(table.response(), without_unused_noise(wanted, table))
        row.compared, row.largest = row.compared + 1, max(row.largest, error)
        late = np.abs(table.time - times).max()
        if error > tolerance or late > (1.01 if stock else 1e-9):
            row.different.append(f"{steps} steps: {error:.1e}, times differ by {late:.1e}")
    return row


def stands(row: Row) -> bool:
    """No difference, and nothing that diffusers accepts and we refuse."""
    return not row.different and all(theirs for theirs, _ in row.refused.values())


def runnable(case: Case) -> bool:
    """Whether what diffusers needs for it is installed."""
    return find_spec("scipy") is not None or not (
        case.scheduler == "LMSDiscreteScheduler" or "use_beta_sigmas" in case.config
    )


def line(row: Row) -> str:
    verdict = "DIFFERENT" if row.different else "ok" if stands(row) else "REFUSED HERE"
    lines = [f"{row.case:150} {row.compared:2} {row.largest:8.1e} {verdict}"]
    lines += [f"    {d}" for d in row.different]
    reasons: dict[tuple[str | None, str | None], list[int]] = {}
    for steps, (theirs, ours) in row.refused.items():
        reasons.setdefault((theirs, ours), []).append(steps)
    for (theirs, ours), steps in reasons.items():
        lines.append(
            f"    at {', '.join(map(str, steps))}: diffusers: {theirs or 'accepts'}; hasten: {ours or 'accepts'}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="CLASS", help="classes whose name contains one of these")
    parser.add_argument("--stock", action="store_true", help="diffusers as it is, in float32")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args(argv)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    rows, skipped = [], 0
    for case in cases():
        if arguments.only and not any(part in case.scheduler for part in arguments.only):
            continue
        if not runnable(case):
            skipped += 1
            continue
        rows.append(measure(case, stock=arguments.stock))
        print(line(rows[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    compared, refused = sum(r.compared for r in rows), sum(len(r.refused) for r in rows)
    failed = [r for r in rows if not stands(r)]
    print(
        f"{len(rows)} configurations, {compared} tables compared, {refused} refused, {len(failed)} configurations "
        f"different, {skipped} skipped for want of scipy",
        file=sys.stderr,
    )
    if arguments.json:
        json.dump([asdict(r) for r in rows], sys.stdout, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
