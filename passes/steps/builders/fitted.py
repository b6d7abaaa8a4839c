"""Policies with numbers that were measured for a model: codebooks, ratios, error curves."""

from __future__ import annotations

from dataclasses import replace

from hasten.errors import UsageError
from hasten.passes.steps.adacache import CODEBOOKS, AdaCache
from hasten.passes.steps.builders.common import BRANCHES, LIMIT, MODULES, count, payload, payload_options, threshold
from hasten.passes.steps.builders.fixed import MASK_OPTIONS, schedule
from hasten.passes.steps.catalog import Entry
from hasten.passes.steps.magcache import INTERPOLATIONS, RATIOS, MagCache
from hasten.passes.steps.masks import MASKS
from hasten.passes.steps.moreg import PIVOT, Motion
from hasten.passes.steps.options import Option
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.retained import Retained


def _adacache(
    *,
    codebook: str,
    bounds: tuple[float, ...] | None,
    rates: tuple[int, ...] | None,
    moreg: bool,
    window: tuple[int, ...] | None,
    strides: tuple[int, ...],
    frames: int | None,
    reset: bool,
    pivot: float,
    limit: int,
    last: int,
    branches: str,
) -> Policy:
    codes = CODEBOOKS[codebook]
    book = codes.codebook
    if bounds is not None or rates is not None:
        if bounds is None or rates is None or len(bounds) + 1 != len(rates) or list(bounds) != sorted(bounds):
            raise UsageError(
                "adacache: a codebook of one's own is bounds=b1/…/bn, rising, with rates=r1/…/rn/r: distances below b1 "
                "give r1, and those beyond bn give r"
            )
        book = tuple(zip((*bounds, float("inf")), rates, strict=True))
    if window is not None and (len(window) != 2 or window[0] > window[1]):
        raise UsageError(f"adacache: window={'/'.join(map(str, window))} is not first/last, two calls counted from 1")
    motion = None
    if moreg:
        first, final = codes.window if window is None else window
        motion = Motion((first, final), strides, frames, reset, pivot)
    decision = AdaCache(book, limit, motion, Retained(first=1, last=last))
    return Policy("adacache", decision, payload("residual", None), branches=branches)


ADACACHE = Entry(
    "each computed call plans the next, by how far an attention residual inside moved",
    {
        "codebook": Option(
            "text", "the reference's, named after its number of steps", "30-fast", choices=tuple(CODEBOOKS)
        ),
        "bounds": Option("numbers", "bounds of a codebook of one's own", None, 0.0),
        "rates": Option("integers", "its rates, one more than bounds", None, 1),
        "moreg": Option("flag", "scale by motion between frames", False),
        "window": Option(
            "integers", "first/last call, from 1, that measures motion; the codebook's where not given", None, 1
        ),
        "strides": Option("integers", "distances in frames over which motion is measured", (1,), 1),
        "frames": count("frames in the tapped tensor's tokens; not given: its tokens are frames", None, 2),
        "reset": Option("flag", "motion starts anew in each run (the reference's does not)", True),
        "pivot": Option("number", "the motion whose factor is 1, Open-Sora's where not given", PIVOT, 1e-6),
        "limit": LIMIT,
        "last": count("calls computed at the end", 2),
        "branches": BRANCHES,
    },
    _adacache,
)


def _magcache(
    *,
    model: str | None,
    ratios: tuple[float, ...] | None,
    threshold: float,
    limit: int,
    retention: float,
    never: tuple[int, ...] | None,
    interpolation: str,
    at_threshold: str,
    branches: str,
) -> Policy:
    if ratios is None:
        if model is None:
            raise UsageError(
                "magcache needs magnitude ratios: model=NAME, ratios=1/…, or the file that calibration writes"
            )
        ratios = RATIOS[model]
    decision = MagCache(ratios, threshold, limit, retention, never or (), interpolation, at_threshold)
    return Policy("magcache", decision, payload("residual", None), branches=branches)


MAGCACHE = Entry(
    "a curve of magnitudes, measured once, says how long a residual lasts",
    {
        "model": Option("text", "whose published ratios", choices=tuple(RATIOS)),
        "ratios": Option("numbers", "ratios of one's own, one a step, the first 1", None, 1e-6),
        "threshold": threshold(0.06),
        "limit": replace(LIMIT, default=3),
        "retention": Option("number", "the share of the run computed at its beginning", 0.2, 0.0, 1.0),
        "never": Option("integers", "steps that never reuse", None, 0),
        "interpolation": Option(
            "text", "how ratios go over to another number of steps", "log-cumulative", choices=INTERPOLATIONS
        ),
        "at_threshold": Option(
            "text", "what an error equal to the threshold does", "reuse", choices=("reuse", "compute")
        ),
        "branches": BRANCHES,
    },
    _magcache,
)


def _smoothcache(
    *, schedule: str | None, stretch: str, modules: tuple[str, ...] | None, payload: str, order: int | None
) -> Policy:
    if schedule is None:
        raise UsageError(
            f"smoothcache needs a mask: schedule=1001…, a name ({', '.join(MASKS)}), or a calibration file"
        )
    return Policy(
        "smoothcache", _schedule(schedule, stretch=stretch), _payload(payload, order), "modules", modules=modules or ()
    )


_schedule, _payload = schedule, payload

SMOOTHCACHE = Entry(
    "module outputs, by masks from error curves",
    {
        "schedule": Option("text", "the mask, or the name of a published one"),
        "stretch": MASK_OPTIONS["stretch"],
        "modules": MODULES,
        **payload_options("value"),
    },
    _smoothcache,
)
