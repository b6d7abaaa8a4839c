"""The step caches of hasten that the table of caches compares: every policy, over the settings of its curve.

What was calibrated is read from a folder of ``MODEL-NAME.json`` files that `hasten calibrate` wrote, such as
``scenes-dit-teacache.json``; ``MODEL-mask….json`` are searched masks, those in ``masks`` beside this file among them. A
policy without its file is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.passes.steps.catalog import canonical, parse
from hasten.passes.steps.forecast import Chebyshev, Taylor

MASKS = Path(__file__).parent / "masks"
"""Masks that took long to find; a file of the same name among the calibrations goes before one of these."""


@dataclass(frozen=True)
class Own:
    """One setting. ``build`` is what the engine is built with, ``threshold`` and ``mask`` what its run is told."""

    method: str
    setting: str
    build: str
    threshold: float | None = None
    mask: str | None = None


def settings(name: str, steps: int, calibrations: Path) -> list[Own]:
    """All settings for one bundled model."""
    return [*_thresholds(name, calibrations), *(_planned(*row, steps) for row in _schedules(name, steps, calibrations))]


def _thresholds(name: str, calibrations: Path) -> Iterator[Own]:
    """Policies that decide in the run: one engine each, and thresholds of round predicted speed-ups."""
    for policy in ("teacache", "first-block", "easycache"):
        if (found := _read(calibrations / f"{name}-{policy}.json")) is None:
            continue
        text = canonical(str(calibrations / f"{name}-{policy}.json"))
        for row in found["fit"]["thresholds"]:
            if row["speedup"] >= 1.9:
                yield Own(policy, f"threshold={row['threshold']:.3g}", text, threshold=row["threshold"])
    if name == "scenes-unet":
        return
    for threshold in (0.05, 0.1, 0.24):
        yield Own("dbcache", f"threshold={threshold:g}", "dbcache:head=1,foot=0,warmup=4,limit=-1", threshold)
    for text in _codebooks(name):
        yield Own("adacache", text.partition(":")[2], text)
        if name == "scenes-video":
            yield Own("adacache with moreg", text.partition(":")[2], f"{text},moreg=true")


def _codebooks(name: str) -> list[str]:
    if name == "scenes-video":  # the second for MoReg, whose factor is 1 at Open-Sora's motion without a pivot
        return ["adacache:codebook=30-fast", "adacache:codebook=30-fast,window=4/46,pivot=0.08"]
    bounds = "0.08/0.16/0.24/0.32/0.4"
    own = [f"adacache:bounds={bounds},rates={rates}" for rates in ("4/3/2/2/1/1", "8/6/5/4/3/2")]
    return ["adacache:codebook=30-slow", "adacache:codebook=30-fast", *own]


def _schedules(name: str, steps: int, calibrations: Path) -> Iterator[tuple[str, str]]:
    """Policies whose decisions are known before the run: method and request."""
    output = ",granularity=output" if name == "scenes-unet" else ""
    if name == "scenes-unet":
        for level in (1, 2):
            yield from (("deepcache", f"deepcache:interval={n},level={level}") for n in (2, 3, 5))
    else:
        yield from (("fora", f"fora:interval={n}") for n in (2, 3, 5))
        for mask in ("scm-slow", "scm-medium", "scm-fast", "scm-ultra"):
            yield "mask", f"mask:bits={mask},stretch=nearest"
        yield from _smooth(calibrations / f"{name}-smoothcache.json")
        yield from _magnitudes(calibrations / f"{name}-magcache.json")
    for interval, order in ((2, 1), (3, 1), (5, 1), (6, 1), (5, 2)):
        yield "taylorseer", f"taylorseer:interval={interval},order={order}{output}"
    for window, flex in ((2, 0.0), (2, 0.25), (2, 0.75), (2, 3.0)):
        yield "spectrum", f"spectrum:window={window},flex={flex}{output}"
    if name != "scenes-unet":  # a schedule for flow-matching models
        for computed in (25, 17, 13):
            yield "meancache", f"meancache:computed={computed}"
        yield "meancache", "meancache:model=qwen-image,computed=10"
    searched = [*MASKS.glob(f"{name}-mask*.json"), *calibrations.glob(f"{name}-mask*.json")]
    for path in sorted({path.name: path for path in searched}.values(), key=lambda path: path.name):
        found = _read(path)
        if found is not None and found.get("steps") == steps and "options" in found:
            yield "searched mask", canonical(str(path))


def _smooth(path: Path) -> Iterator[tuple[str, str]]:
    from hasten.backends.calibrate_file import read
    from hasten.passes.steps.fitting_schedule import mean_errors, smooth_reaching

    if path.is_file():
        made = read(path)
        for wanted in (1.5, 2.0, 3.0):
            yield (
                "smoothcache",
                f"smoothcache:schedule={smooth_reaching(mean_errors(made.samples), wanted, made.share).merged}",
            )


def _magnitudes(path: Path) -> Iterator[tuple[str, str]]:
    if (found := _read(path)) is not None:
        ratios = "/".join(f"{r:.6g}" for r in found["options"]["ratios"])
        for threshold, limit in ((0.03, 3), (0.12, 3), (0.2, 4), (0.4, 6), (0.8, 6)):
            yield "magcache", f"magcache:ratios={ratios},threshold={threshold},limit={limit}"


def _planned(method: str, text: str, steps: int) -> Own:
    mask = parse(text).decision.mask(steps)
    assert mask is not None, text
    bits = "".join(str(int(bit)) for bit in mask)
    told = _short(text)
    if method in ("smoothcache", "searched mask"):
        policy = parse(text)
        payload = "fitted" if policy.payload.name == "table" else policy.payload.name
        told = f"{bits.count('1')} of {steps}, {policy.granularity}, {payload}"
    return Own(method, told, _engine(text, steps), mask=bits)


def _engine(text: str, steps: int) -> str:
    """What serves every mask of one region and payload: a run is told its decisions, so they share an engine."""
    policy = parse(text)
    payload, of = policy.payload, getattr(policy.payload, "of", "")
    name = payload.name
    if name not in ("residual", "value", "taylor") and payload != Chebyshev():
        return text
    words = [f"mask:bits={'1' * steps}", f"granularity={policy.granularity}", f"level={policy.level}"]
    words += [f"payload={name}-residual" if of == "residual" else f"payload={name}"]
    words += [f"order={payload.order}"] if isinstance(payload, Taylor) else []
    words += [f"modules={'/'.join(policy.modules)}"] if policy.modules else []
    return canonical(",".join(words))


def _short(text: str) -> str:
    """A request without its long lists."""
    name, _, rest = text.partition(":")
    words = [word for word in rest.split(",") if len(word) < 40 and not word.startswith("stretch")]
    return ",".join(words) or name


def ratios(name: str, calibrations: Path) -> list[float]:
    """MagCache's, for the peers as well; ones where there is no file."""
    found = _read(calibrations / f"{name}-magcache.json")
    return [1.0] if found is None else list(found["options"]["ratios"])


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
