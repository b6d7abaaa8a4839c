"""What the reference implementations do differently from the methods that they are named after.

``compat="diffusers"``, the default of every builder, follows diffusers so that pictures stay the same; ``compat=None``
is the method as published. Each difference has its name here, and a test that shows it. Found in diffusers 0.42, but
for the last, which is of the implementation that its paper names.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import UsageError


@dataclass(frozen=True)
class Defect:
    """One difference: its name, where it is, and what it does."""

    name: str
    where: str
    what: str


FIXED_STRIDE = Defect(
    "fixed-stride",
    "DDIM, PNDM",
    "a step goes from t to t - T // steps, which is not the grid's next time for linspace, nor for trailing where the "
    "steps do not divide T",
)
HALVED_SECOND_DIFFERENCE = Defect(
    "halved-second-difference",
    "DPM-Solver and DPM-Solver++, order 3, multistep",
    "the second divided difference stands for the second derivative without its factor 2: the method is of order 2",
)
SDE_SECOND_DIFFERENCE_SIGN = Defect(
    "sde-second-difference-sign",
    "SDE-DPM-Solver++, order 3",
    "the weight of the second derivative ends in -1/2 where it must be +1/2: the method is of order 1",
)
SDE_NOISE_FORM_ORDER_3 = Defect(
    "sde-noise-form-order-3",
    "SDE-DPM-Solver, order 3",
    "there is no third-order update, and the scheduler stops with UnboundLocalError",
)
BH1_ZERO_END = Defect(
    "bh1-zero-end",
    "UniPC, bh1",
    "the step to zero noise multiplies infinity by zero: the last sample is NaN",
)
MIXED_VELOCITIES = Defect(
    "mixed-velocities",
    "PNDM and PLMS, v_prediction",
    "Adams-Bashforth mixes v of different times, and the mixture is converted with the current time and sample",
)
SHIFTED_TWICE = Defect(
    "shifted-twice",
    "Euler and Heun for flows, default grid",
    "the ends of the grid are shifted already, and shifted again",
)
REPEATED_END = Defect(
    "repeated-end",
    "DEIS with Karras, exponential, beta or flow levels; DPM-Solver and UniPC with such levels and end sigma_min",
    "the last level is repeated, so the last step does nothing",
)
WHOLE_TIMES = Defect(
    "whole-times",
    "DPM-Solver, UniPC, DEIS with levels of their own",
    "the network is told the nearest, or the next lower, whole time instead of that of the level",
)
IGNORED_FIRST_PREDICTION = Defect(
    "ignored-first-prediction",
    "iPNDM",
    "the first step starts where the signal level is zero and drops the predicted x0",
)
MISSING_HISTORY = Defect(
    "missing-history",
    "LMS, a run that starts late",
    "weights are those of order min(row + 1, order), counted from the grid's first row, and apply to the values there "
    "are: the first step of an image-to-image run takes one of four weights, which do not add up to the step",
)
LATE_CORRECTION = Defect(
    "late-correction",
    "PNDM with skip_prk_steps (PLMS), a run that starts late",
    "the second call corrects the first, but the grid repeats no time there: from then on the network is told, and the "
    "step is taken from, the time after that of the sample",
)
WINDOW_OF_ORDER_1 = Defect(
    "window-of-order-1",
    "ParaDPMSolverMultistepScheduler (ParaDiGMS), Picard sampling",
    "the first row of a window has no earlier value, falls back to order 1 and clips x0 to -1 .. 1. No scheduler of "
    "diffusers does, so that nothing here follows it under any compat: a window's states hold what their rows remember",
)

DEFECTS = (
    FIXED_STRIDE,
    HALVED_SECOND_DIFFERENCE,
    SDE_SECOND_DIFFERENCE_SIGN,
    SDE_NOISE_FORM_ORDER_3,
    BH1_ZERO_END,
    MIXED_VELOCITIES,
    SHIFTED_TWICE,
    REPEATED_END,
    WHOLE_TIMES,
    IGNORED_FIRST_PREDICTION,
    MISSING_HISTORY,
    LATE_CORRECTION,
    WINDOW_OF_ORDER_1,
)


def follows(compat: str | None, defect: Defect, *, solver: str) -> bool:
    """Whether ``defect`` is to be followed; ``solver`` begins the message about another ``compat``."""
    check(compat, solver=solver)
    return compat == "diffusers" and defect in DEFECTS


def check(compat: str | None, *, solver: str) -> None:
    """Refuse a ``compat`` that is neither None nor ``diffusers``."""
    if compat not in (None, "diffusers"):
        raise UsageError(f"{solver}: compat is 'diffusers' or None, not {compat!r}")
