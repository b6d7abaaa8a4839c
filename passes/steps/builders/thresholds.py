"""Policies that compare a measured distance with a threshold."""

from __future__ import annotations

from hasten.errors import UsageError
from hasten.passes.steps.builders.common import BRANCHES, LIMIT, count, payload, payload_options, threshold
from hasten.passes.steps.builders.fixed import MASK_OPTIONS, schedule
from hasten.passes.steps.catalog import Entry
from hasten.passes.steps.easycache import EasyCache
from hasten.passes.steps.first_block import FirstBlock
from hasten.passes.steps.options import Option
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.retained import Retained
from hasten.passes.steps.teacache import SIGNS, TeaCache
from hasten.passes.steps.teacache_models import MODELS

_AT = ("reuse", "compute")


def _teacache(
    *,
    threshold: float | None,
    model: str | None,
    coefficients: tuple[float, ...] | None,
    sign: str,
    strict: bool,
    fitted: float | None,
    limit: int,
    first: int | None,
    last: int | None,
    signal: str | None,
    times: tuple[float, ...] | None,
    branches: str,
) -> Policy:
    known = MODELS[model] if model is not None else None
    if coefficients is None:
        if known is None:
            raise UsageError(
                "teacache needs a polynomial: model=NAME, coefficients=c4/c3/…/c0, highest power first, or the file "
                "that calibration writes"
            )
        coefficients = known.coefficients
    if threshold is None:
        if known is None:
            raise UsageError("teacache: coefficients of one's own have no usual threshold; give threshold=NUMBER")
        threshold = known.thresholds[0]
    retained = known.retained if known else Retained(first=1, last=1)
    retained = Retained(
        retained.first if first is None else first,
        retained.last if last is None else last,
        retained.share if first is None else 0.0,
    )
    looks_at = signal or (known.signal if known else "modulated")
    if times is not None and looks_at != "time-embedding":
        raise UsageError(
            f"teacache: times were given, and the signal is {looks_at}, which each run has of its own; "
            "give signal=time-embedding, or leave times out"
        )
    decision = TeaCache(
        coefficients=coefficients,
        threshold=threshold,
        limit=limit,
        sign=sign,
        strict=strict,
        fitted=float("inf") if fitted is None else fitted,
        retained=retained,
        signal=looks_at,
        times=times or (),
    )
    return Policy("teacache", decision, payload("residual", None), branches=branches)


TEACACHE = Entry(
    "computes when the changes of a signal have added up, mapped by a polynomial that was fitted for the model",
    {
        "threshold": threshold(),
        "model": Option("text", "whose published polynomial", choices=tuple(MODELS)),
        "coefficients": Option("numbers", "the polynomial, highest power first"),
        "sign": Option("text", "what is added where the polynomial is negative", "signed", choices=SIGNS),
        "strict": Option("flag", "a sum equal to the threshold computes", True),
        "fitted": Option("number", "the largest distance that the polynomial was fitted on", None, 0.0),
        "limit": LIMIT,
        "first": count("calls computed at the beginning", None, 1),
        "last": count("calls computed at the end", None),
        "signal": Option("text", "what is measured", None, choices=("modulated", "time-embedding")),
        "times": Option("numbers", "the timesteps of the run, to decide on the time embedding when an engine is built"),
        "branches": BRANCHES,
    },
    _teacache,
)


def _first_block(*, threshold: float, limit: int, warmup: int, at_threshold: str, branches: str) -> Policy:
    decision = FirstBlock(threshold, limit, at_threshold=at_threshold, retained=Retained(first=warmup))
    return Policy("first-block", decision, payload("residual", None), "tail", branches, head=1)


FIRST_BLOCK = Entry(
    "runs the first block, and the others only where its residual changed since they last ran",
    {
        "threshold": threshold(0.05),
        "limit": LIMIT,
        "warmup": count("calls computed at the beginning", 1, 1),
        "at_threshold": Option("text", "what a distance equal to the threshold does", "reuse", choices=_AT),
        "branches": BRANCHES,
    },
    _first_block,
)


def _dbcache(
    *,
    head: int,
    foot: int,
    warmup: int,
    threshold: float,
    limit: int,
    cached: int,
    at_threshold: str,
    mask: str | None,
    stretch: str,
    branches: str,
    payload: str,
    order: int | None,
) -> Policy:
    decision = FirstBlock(
        threshold,
        limit,
        cached,
        at_threshold,
        Retained(first=warmup),
        schedule(mask, stretch=stretch) if mask is not None else None,
    )
    return Policy("dbcache", decision, _payload(payload, order), "tail", branches, head=head, foot=foot)


_payload = payload

DBCACHE = Entry(
    "first-block with more blocks at either end, a warm-up and limits (cache-dit)",
    {
        "head": count("blocks at the beginning that always run", 8, 1),
        "foot": count("blocks at the end that always run", 0),
        "warmup": count("calls computed at the beginning", 8, 1),
        "threshold": threshold(0.08),
        "limit": LIMIT,
        "cached": Option("integer", "the most reuses in a run, -1 for any number", -1, -1, 1 << 40),
        "at_threshold": Option("text", "what a distance equal to the threshold does", "compute", choices=_AT),
        "mask": Option("text", "calls that are computed whatever the distance: 1001…, or a named mask"),
        "stretch": MASK_OPTIONS["stretch"],
        "branches": BRANCHES,
        **payload_options("residual"),
    },
    _dbcache,
)


def _easycache(*, threshold: float, limit: int, warmup: int, last: int, branches: str) -> Policy:
    decision = EasyCache(threshold, limit, Retained(first=warmup, last=last))
    return Policy("easycache", decision, payload("residual", None), "output", branches)


EASYCACHE = Entry(
    "watches the model's input and output alone; needs no calibration",
    {
        "threshold": threshold(0.05),
        "limit": LIMIT,
        "warmup": count("calls computed at the beginning", 5, 1),
        "last": count("calls computed at the end", 1),
        "branches": BRANCHES,
    },
    _easycache,
)
