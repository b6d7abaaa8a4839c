"""Time implementations of a layer side by side: warmed up, interleaved in one process, with medians.

Whatever else the machine does meets all of them. Inputs and weights are as warm as the other implementations leave
them: for layers of a few milliseconds and more about as in a model, for smaller ones warmer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hasten.backends.tuning_file import Measurement, Timing, now
from hasten.passes.choice import Layer

ROUNDS, LEAST_ROUNDS = 21, 3
MIN_SECONDS = 2e-3
"""One timing takes at least so long: short calls are repeated within it."""
BUDGET = 1.0
"""Seconds that one layer may take, unless the least rounds need more."""

Runners = Callable[[Layer, str], Mapping[str, Callable[[], Any]]]
"""(layer, implementation) -> its forms by name, ready to be called; the fastest counts."""


def measure(
    layer: Layer,
    names: Iterable[str],
    runners: Runners,
    *,
    rounds: int = ROUNDS,
    min_seconds: float = MIN_SECONDS,
    budget: float = BUDGET,
) -> Measurement:
    """Time the implementations ``names`` of ``layer``: warmed up, in an order that rotates from round to round.

    At most ``rounds`` rounds, fewer where ``budget`` (seconds) ends, `LEAST_ROUNDS` at least. An implementation that
    raises is recorded as failed. Torch's number of threads is the layer's meanwhile, gradients and autocast are off.
    """
    failed: dict[str, str] = {}
    with _alone(layer):
        started = time.perf_counter()
        runs = [run for name in names for run in _prepare(layer, name, runners, min_seconds, failed)]
        spent = time.perf_counter() - started
        cost = sum(run.repeats * run.estimate for run in runs)
        affordable = int((budget - spent) / cost) if cost else 0
        interrupted, began = _interruptions(), time.perf_counter()
        for count in range(min(rounds, max(LEAST_ROUNDS, affordable))):
            first = count % max(1, len(runs))
            for run in runs[first:] + runs[:first]:
                run.time()
        interrupted = round((_interruptions() - interrupted) / max(1e-3, time.perf_counter() - began), 1)
    timings: dict[str, Timing] = {}
    for run in runs:
        if run.reason:
            failed.setdefault(run.name, run.reason)
        elif run.name not in timings or run.timing().seconds < timings[run.name].seconds:
            timings[run.name] = run.timing()
    return Measurement(timings, {n: r for n, r in failed.items() if n not in timings}, now(), interrupted)


@dataclass
class _Run:
    """One form of an implementation, being timed. ``estimate``: seconds of a warm call."""

    name: str
    way: str
    call: Callable[[], Any]
    settle: Callable[[], object]
    repeats: int = 1
    estimate: float = 0.0
    seconds: list[float] = field(default_factory=list)
    reason: str = ""

    def warm_up(self, min_seconds: float) -> None:
        """Two calls: the first may compile, the second says how many make up one timing."""
        self.time()
        self.time()
        if not self.reason:
            self.estimate = self.seconds[-1]
            self.repeats = max(1, math.ceil(min_seconds / self.estimate))
            self.seconds.clear()

    def time(self) -> None:
        """One timing, or the reason why there is none."""
        if self.reason:
            return
        try:
            self.settle()
            started = time.perf_counter()
            for _ in range(self.repeats):
                self.call()
            self.settle()
            self.seconds.append(max(1e-9, time.perf_counter() - started) / self.repeats)
        except Exception as error:
            self.reason = _sentence(error)

    def timing(self) -> Timing:
        p20, median, p80 = (float(p) for p in np.percentile(self.seconds, (20, 50, 80)))
        return Timing(median, p20, p80, len(self.seconds), self.way)


def _prepare(layer: Layer, name: str, runners: Runners, min_seconds: float, failed: dict[str, str]) -> list[_Run]:
    """The forms of an implementation that work, warmed up; the reason in ``failed`` where none does."""
    try:
        ways = runners(layer, name)
    except Exception as error:
        failed[name] = _sentence(error)
        return []
    runs = [_Run(name, way, call, _settle(layer.device)) for way, call in ways.items()]
    for run in runs:
        run.warm_up(min_seconds)
    if all(run.reason for run in runs):
        failed[name] = runs[0].reason if runs else "it has no form here"
    return [run for run in runs if not run.reason]


def _settle(device: str) -> Callable[[], object]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _interruptions() -> float:
    """How often the system has taken a processor away from this process; zero where it does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _alone(layer: Layer) -> Iterator[None]:
    """Plain tensors, and the layer's threads; both are as they were afterwards, for a compilation may be under way."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    before = torch.get_num_threads()
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast(layer.device, enabled=False):
        try:
            if layer.device == "cpu":
                torch.set_num_threads(layer.threads)
            yield
        finally:
            if layer.device == "cpu":
                torch.set_num_threads(before)
