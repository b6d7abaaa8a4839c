"""Calibrate a step cache: record runs of a model, fit a policy's numbers to them, and try the result.

A `Subject` is a captured model with the region that its policy leaves out. Everything that takes long is written after
each run, so that a calibration which is interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.backends.calibrate_file import Calibration, read
from hasten.backends.calibrate_fit import DEFAULT_SPEEDUP, Fitted, Wishes, complete, requested
from hasten.backends.calibrate_search import Bounds, computed_calls, kept, search
from hasten.errors import UsageError
from hasten.passes.steps.builders.fixed import FITTED, HISTORY
from hasten.passes.steps.fitting import Sample, speedup

if TYPE_CHECKING:
    from hasten.backends.calibrate_runs import Draw, Runs
    from hasten.backends.calibrate_trial import Cached, Trials
    from hasten.backends.program import FlatProgram
    from hasten.backends.region import Found
    from hasten.models.adapter import Adapter
    from hasten.passes.fx.step_cache import Cut

Tell = Callable[[str, float], object]
"""(what is being done, part of it that is done)."""
SAVE_SECONDS = 10.0
"""How often a search writes what it tried."""


@dataclass(frozen=True)
class Subject:
    """A captured model, how it is run, and what its policy leaves out of a call."""

    request: str
    runs: Runs
    flat: FlatProgram
    found: Found[Cut]
    blank: Calibration

    @cached_property
    def trials(self) -> Trials:
        """Runs with and without a cache."""
        from hasten.backends.calibrate_runs import cast
        from hasten.backends.calibrate_trial import Trials

        module = self.flat.module
        plain = cast(lambda *tensors: module(*tensors)[0], self.flat.example_inputs)
        return Trials(self.runs, self.flat, plain)

    def cached(self, text: str) -> Cached:
        """The model with a step cache in its region."""
        from hasten.backends.calibrate_trial import Cached

        return Cached(self.flat, self.found.cut, text)


def subject(
    adapter: Adapter,
    cache: str,
    *,
    steps: int,
    guidance: float | None = None,
    dtype: str = "float32",
    region: str | None = None,
    distance: int,
    weights: str,
) -> Subject:
    """Capture a model, and find what ``cache`` leaves out of it; a calibration of nothing yet goes with it."""
    import torch

    from hasten.backends.calibrate_runs import runs_of
    from hasten.backends.capture import capture
    from hasten.backends.program import flatten
    from hasten.backends.region import find_cut
    from hasten.backends.step_cache import with_cache

    _, policy = requested(cache)
    runs = runs_of(adapter, steps, guidance)
    wanted = getattr(torch, dtype)
    examples = runs.adapter.example_inputs(dtype=wanted)
    program = capture(runs.adapter.module().to(wanted), (), examples)
    flat = flatten(program.module(check_guards=False), program)
    if len(flat.inputs) != len(examples):
        raise UsageError(f"{adapter.name}: the capture froze some of its inputs; it cannot be run step by step")
    found = find_cut(flat.module, policy, region)
    blank = Calibration(
        model=adapter.name,
        request=cache,
        region=found.summary + (f"; the decision looks at {looks}" if (looks := policy.decision.signal) else ""),
        steps=steps,
        shape=tuple(next(iter(examples.values())).shape),
        dtype=dtype,
        guidance=runs.guidance,
        distance=min(distance, steps - 1),
        weights=weights,
        how=runs.how,
        share=found.share,
        state_bytes=with_cache(flat, found.cut, policy, "straight").state_bytes,
        versions=versions(),
    )
    return Subject(cache, runs, flat, found, blank)


def resume(blank: Calibration, path: Path) -> Calibration:
    """What an interrupted calibration of the same settings left at ``path``, else ``blank``."""
    if not path.exists():
        return blank
    there = read(path)
    if told := blank.difference(there):
        raise UsageError(
            f"{path} holds another recording: {told}; give another file with -o, or remove this one to start anew"
        )
    if there.request != blank.request:  # errors of masks under another payload say nothing about this one
        return replace(blank, samples=there.samples)
    return replace(blank, samples=there.samples, tried=there.tried, tried_on=there.tried_on)


def record(subject: Subject, calibration: Calibration, draws: Sequence[Draw], path: Path, tell: Tell) -> Calibration:
    """Record the runs that are not recorded yet, and write the file after each."""
    from hasten.backends.calibrate_runs import cast
    from hasten.backends.recording import Recorder, watch

    _, policy = requested(subject.request)
    have = {(s.seed, s.label) for s in calibration.samples}
    missing = [draw for draw in draws if (draw.seed, draw.label) not in have]
    if missing:
        watched = watch(subject.flat.module, subject.found, policy)
        recorder = Recorder(subject.flat.module, watched, calibration.distance)
        denoise = cast(recorder, subject.flat.example_inputs)
    for number, draw in enumerate(missing):
        tell(f"recording run {len(draws) - len(missing) + number + 1} of {len(draws)}", number / len(missing))
        recorder.restart()
        subject.runs.run(denoise, draw)
        made = recorder.sample(draw.seed, draw.label)
        # as a file has it, so that a fit does not depend on whether a run was read or just made
        made = Sample.from_dict(made.as_dict(), calibration.steps)
        calibration = replace(calibration, samples=(*calibration.samples, made))
        calibration.write(path)
    return calibration


def find_mask(
    subject: Subject,
    calibration: Calibration,
    draws: Sequence[Draw],
    wishes: Wishes,
    bounds: Bounds,
    path: Path,
    tell: Tell,
) -> tuple[Calibration, Fitted]:
    """Search a mask on the runs ``draws``; what was tried is in the calibration that is returned."""
    from hasten.backends.calibrate_weights import Weighed, check_whole

    request, _ = requested(subject.request)
    options = {key: value for key, value in request.options.items() if value is not None}
    start = options.get("bits")
    computed = computed_calls(wishes.speedup or DEFAULT_SPEEDUP, calibration.steps, calibration.share, start)
    payload = options.get("payload", "residual")
    moves = [kept(sample, payload) for sample in calibration.samples]
    seeds = tuple(draw.seed for draw in draws)
    known = dict(calibration.tried) if calibration.tried_on == seeds else {}
    weighed = None
    if payload == FITTED:
        check_whole(options["granularity"])
        weighed = Weighed(subject.trials, draws, options.get("history") or HISTORY)
    ones = {**request.options, "bits": "1" * calibration.steps}
    cached = subject.cached(str(replace(request, options=ones)))
    saved, before = time.monotonic(), len(known)
    total = bounds.evaluations + bounds.longest * calibration.steps + 2

    def error(mask: str) -> float:
        nonlocal saved
        tell(f"trying masks, {len(known) + 1} so far", min(0.99, (len(known) - before) / total))
        if weighed is not None:
            value = weighed.error(mask)
        else:
            value = sum(subject.trials.forced(cached, draw, mask) for draw in draws) / len(draws)
        if time.monotonic() - saved > SAVE_SECONDS:
            replace(calibration, tried=dict(known), tried_on=seeds).write(path)
            saved = time.monotonic()
        return value

    found = search(moves, computed, start, bounds, error, known, weighed.guess if weighed is not None else None)
    if weighed is not None:
        options |= {"history": weighed.history, "weights": weighed.fit.of_mask(found.mask)}
    stages = {name: {"mask": mask, "error": value} for name, (mask, value) in found.stages.items()}
    calibration = replace(calibration, tried=known, tried_on=seeds)
    told = {"computed": computed, "tried": len(known), "seed": bounds.seed, "stages": stages}
    return calibration, Fitted({**options, "bits": found.mask}, (found.mask,), told)


def check(subject: Subject, name: str, fitted: Fitted, draws: Sequence[Draw], tell: Tell) -> dict[str, Any]:
    """Run the fitted policy on ``draws`` and compare with the same runs uncached."""
    from hasten.backends.calibrate_runs import decibels
    from hasten.passes.steps.catalog import read
    from hasten.passes.steps.options import Request

    text = str(Request(name, {**read(name).options, **fitted.options}))
    cached = subject.cached(text)
    errors, masks, sizes = [], [], []
    for number, draw in enumerate(draws):
        tell(f"checking run {number + 1} of {len(draws)}", number / len(draws))
        error, mask = subject.trials.free(cached, draw)
        errors.append(error)
        masks.append(mask)
        sizes.append(float(subject.trials.uncached(draw).square().mean()))
    mean = sum(errors) / len(errors)
    return {
        "seeds": [draw.seed for draw in draws],
        "masks": masks,
        "computed": sum(mask.count("1") for mask in masks) / len(masks),
        "speedup": speedup(masks, subject.found.share),
        "mean_squared_error": mean,
        "relative_rms_error": (mean / max(sum(sizes) / len(sizes), 1e-30)) ** 0.5,
        "psnr_db": decibels(mean, subject.runs.peak),
    }


def finished(calibration: Calibration, fitted: Fitted, checked: dict[str, Any] | None) -> Calibration:
    """The calibration as ``--cache`` reads it; `UsageError` if its options would not."""
    complete(calibration.kind, fitted.options)
    fit = {**fitted.fit, "predicted": predicted(calibration, fitted), **({"checked": checked} if checked else {})}
    return replace(calibration, policy=calibration.kind, options=fitted.options, fit=fit)


def predicted(calibration: Calibration, fitted: Fitted) -> dict[str, Any]:
    """What is expected of a run: a mask (of the first sample), the computed calls on average, and the speed-up."""
    return {
        "mask": fitted.masks[0],
        "computed": sum(mask.count("1") for mask in fitted.masks) / len(fitted.masks),
        "speedup": speedup(fitted.masks, calibration.share),
    }


def versions() -> dict[str, str]:
    """Of what a calibration depends on."""
    import torch

    import hasten

    diffusers = sys.modules.get("diffusers")
    found = {"hasten": hasten.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return found | ({"diffusers": diffusers.__version__} if diffusers is not None else {})
