"""Policies whose decisions are known before the run."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.errors import UsageError, nearest
from hasten.passes.steps.builders.common import BRANCHES, MODULES, PAYLOADS, count, payload, payload_options
from hasten.passes.steps.catalog import Entry
from hasten.passes.steps.forecast import Table, rows_of_mask
from hasten.passes.steps.masks import MASKS
from hasten.passes.steps.options import Option
from hasten.passes.steps.policy import Payload, Policy
from hasten.passes.steps.schedules import STRETCH, Interval, Mask, bits_of_bins, bits_of_steps

_GRANULARITIES = ("stack", "tail", "output", "modules", "deep")

MASK_OPTIONS: Mapping[str, Option] = {
    "bits": Option("text", "1 computes, 0 reuses, one a step, or a named mask"),
    "computed": Option("integers", "the numbers of the steps that compute, from 0"),
    "steps": count("steps of the run that 'computed' is for", None, 1),
    "computed_bins": Option("integers", "how many steps compute, in turns with 'reused_bins'", None, 0),
    "reused_bins": Option("integers", "how many steps reuse, after each of 'computed_bins'", None, 0),
    "stretch": Option("text", "what to do in a run of another length", "refuse", choices=STRETCH),
}


def schedule(
    bits: str | None = None,
    computed: tuple[int, ...] | None = None,
    steps: int | None = None,
    computed_bins: tuple[int, ...] | None = None,
    reused_bins: tuple[int, ...] | None = None,
    stretch: str = "refuse",
) -> Mask:
    """The mask from the one way in which it is given; `UsageError` for none, two, or a name that is not known."""
    ways = [name for name, value in (("bits", bits), ("computed", computed), ("computed_bins", computed_bins)) if value]
    if len(ways) != 1:
        raise UsageError(f"mask: give one of bits, computed and computed_bins; {' and '.join(ways) or 'none'} given")
    if computed is not None:
        if steps is None:
            raise UsageError("mask: computed is a list of steps of a run; give its number of steps too: steps=N")
        return Mask(bits_of_steps(computed, steps), stretch)
    if computed_bins is not None:
        return Mask(bits_of_bins(computed_bins, reused_bins or ()), stretch)
    assert bits is not None
    if set(bits) <= {"0", "1"}:
        return Mask(bits, stretch)
    if bits not in MASKS:
        raise UsageError(
            f"mask: {bits!r} is neither 1 (compute) and 0 (reuse) nor the name of a mask; "
            f"names: {', '.join(MASKS)}.{nearest(bits, MASKS)}"
        )
    return Mask(MASKS[bits].bits, stretch)


def _mask(
    *,
    bits: str | None,
    computed: tuple[int, ...] | None,
    steps: int | None,
    computed_bins: tuple[int, ...] | None,
    reused_bins: tuple[int, ...] | None,
    stretch: str,
    granularity: str,
    head: int,
    foot: int,
    level: int,
    modules: tuple[str, ...] | None,
    branches: str,
    payload: str,
    order: int | None,
    history: int | None,
    weights: tuple[float, ...] | None,
) -> Policy:
    decision = schedule(bits, computed, steps, computed_bins, reused_bins, stretch)
    return Policy(
        "mask",
        decision,
        _forecast(decision, payload, order, history, weights),
        granularity,
        branches,
        head,
        foot,
        level,
        modules or (),
    )


_payload = payload
FITTED = "fitted"
HISTORY = 3
"""Results that a fitted forecast is made from, where nothing else is asked for."""


def _forecast(
    decision: Mask, name: str, order: int | None, history: int | None, weights: tuple[float, ...] | None
) -> Payload:
    """The payload; `UsageError` where weights of one's own do not fit the mask, or are given to another payload."""
    if name != FITTED:
        for option, value in (("history", history), ("weights", weights)):
            if value is not None:
                raise UsageError(f"mask: {option} was given, and payload={name} has none; payload=fitted does")
        return _payload(name, order)
    if order is not None:
        raise UsageError(f"order: {order} was given, but payload={name} has weights instead; leave it out")
    if decision.stretch != "refuse":
        raise UsageError(f"mask: payload={name} has weights for the steps of one run; leave stretch out")
    kept, given = history or HISTORY, weights or ()
    reused = decision.bits[1:].count("0")
    if len(given) != kept * reused:
        raise UsageError(
            f"mask: payload={name} needs {kept} weights for each of {reused} reused steps, and {len(given)} were given "
            f"in all; hasten calibrate --cache mask:payload={name} finds them"
        )
    return Table(rows_of_mask(decision.bits, given, kept), kept)


MASK = Entry(
    "the caller's own schedule",
    {
        **MASK_OPTIONS,
        "granularity": Option("text", "what is left out", "stack", choices=_GRANULARITIES),
        "head": count("blocks at the beginning that always run"),
        "foot": count("blocks at the end that always run"),
        "level": count("levels of a UNet that always run", 1, 1),
        "modules": MODULES,
        "branches": BRANCHES,
        **payload_options("residual"),
        "payload": Option("text", "what a reused call returns", "residual", choices=(*PAYLOADS, FITTED)),
        "history": count("results that a fitted forecast is made from, 3 where not given", None, 1),
        "weights": Option("numbers", "a fitted forecast's: of each of these results, newest first, step by step"),
    },
    _mask,
    bare="bits",
)


def _fora(*, interval: int, last: int, modules: tuple[str, ...] | None, payload: str, order: int | None) -> Policy:
    decision = Interval(interval, last=last)
    return Policy("fora", decision, _payload(payload, order), "modules", modules=modules or ())


FORA = Entry(
    "attention and feed-forward modules run every n-th call",
    {
        "interval": count("calls from one computed to the next", 2, 1),
        "last": count("calls computed at the end", 1),
        "modules": MODULES,
        **payload_options("value"),
    },
    _fora,
)


def _deepcache(*, interval: int, level: int, last: int, payload: str, order: int | None) -> Policy:
    return Policy("deepcache", Interval(interval, last=last), _payload(payload, order), "deep", level=level)


DEEPCACHE = Entry(
    "the inner levels of a UNet run every n-th call, the outer ones always",
    {
        "interval": count("calls from one computed to the next", 3, 1),
        "level": count("levels that always run", 1, 1),
        "last": count("calls computed at the end", 0),
        **payload_options("value"),
    },
    _deepcache,
)
