"""Policies whose decisions are known before the run, and whose reused calls extrapolate."""

from __future__ import annotations

from hasten.errors import UsageError
from hasten.passes.steps.builders.common import MODULES, count
from hasten.passes.steps.builders.fixed import MASK_OPTIONS
from hasten.passes.steps.catalog import Entry
from hasten.passes.steps.forecast import Chebyshev, Table, Taylor
from hasten.passes.steps.meancache import TABLES, noise_levels, rows
from hasten.passes.steps.options import Option
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.schedules import Interval, Mask, Windows, bits_of_steps


def _taylorseer(
    *, interval: int, order: int, warmup: int, after: int | None, granularity: str, modules: tuple[str, ...] | None
) -> Policy:
    decision = Interval(interval, warmup, offset=1, after=after)
    return Policy("taylorseer", decision, Taylor(order), granularity, modules=modules or ())


TAYLORSEER = Entry(
    "every n-th call, extrapolated by a Taylor polynomial between",
    {
        "interval": count("calls from one computed to the next", 5, 1),
        "order": Option("integer", "the order of the polynomial", 1, 0, 4),
        "warmup": count("calls computed at the beginning", 3),
        "after": count("the call from which all compute", None),
        "granularity": Option("text", "what is left out", "stack", choices=("stack", "output", "modules")),
        "modules": MODULES,
    },
    _taylorseer,
)


def _spectrum(
    *,
    window: float,
    flex: float,
    warmup: int,
    degree: int,
    ridge: float,
    mix: float,
    history: int,
    span: int | None,
    granularity: str,
) -> Policy:
    payload = Chebyshev(degree, ridge, mix, history, span)
    return Policy("spectrum", Windows(window, flex, warmup), payload, granularity)


SPECTRUM = Entry(
    "growing windows, extrapolated by Chebyshev polynomials",
    {
        "window": Option("number", "calls from one computed to the next, at first", 2.0, 1.0),
        "flex": Option("number", "growth of the window with each computed call", 0.75, 0.0),
        "warmup": count("calls computed at the beginning", 5, 1),
        "degree": Option("integer", "the polynomials' highest degree", 4, 1, 8),
        "ridge": Option("number", "the ridge penalty", 0.1, 1e-6),
        "mix": Option("number", "the fit's share, the rest is linear extrapolation", 0.5, 0.0, 1.0),
        "history": count("tensors kept", 16, 2),
        "span": count("calls over which the polynomials are spread, the run's where not given", None, 1),
        "granularity": Option("text", "what is left out", "stack", choices=("stack", "output")),
    },
    _spectrum,
)


def _meancache(*, model: str, computed: int, shift: float, stretch: str) -> Policy:
    budgets = TABLES[model]
    if computed not in budgets:
        raise UsageError(
            f"meancache: {model} has no schedule that computes {computed} steps; it has {', '.join(map(str, budgets))}"
        )
    found = budgets[computed]
    made, history = rows(found.computed, found.orders, noise_levels(found.steps, shift))
    bits = bits_of_steps(found.computed, found.steps)
    return Policy("meancache", Mask(bits, stretch), Table(made, history), "output")


MEANCACHE = Entry(
    "published schedules of computed steps, with the average velocity between them (a flow-matching model's output)",
    {
        "model": Option("text", "whose schedule", "z-image", choices=tuple(TABLES)),
        "computed": count("steps that compute", 13, 1),
        "shift": Option("number", "the shift of the noise schedule", 3.0, 1e-3),
        "stretch": MASK_OPTIONS["stretch"],
    },
    _meancache,
)
