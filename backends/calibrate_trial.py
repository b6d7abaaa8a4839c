"""Run a model with a step cache, without building it: the programs that a build would compile, in eager PyTorch.

Decisions and payloads are those of an engine, and `CachedRun` carries the state; only speed is not to be seen here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from hasten.backends.cached_run import CachedRun
from hasten.backends.calibrate_runs import Denoise, Draw, Runs
from hasten.backends.step_cache import with_cache
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.forecast import Taylor
from hasten.passes.steps.payload import Residual, Value

if TYPE_CHECKING:
    from hasten.backends.engine import Engine
    from hasten.backends.program import FlatProgram
    from hasten.passes.fx.step_cache import Cut
    from hasten.passes.steps.policy import Payload


@dataclass(frozen=True)
class _Program:
    """One program under an engine's program's interface."""

    flat: FlatProgram

    @property
    def inputs(self) -> Any:
        return self.flat.inputs

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        results = self.flat.module(*(inputs[spec.name] for spec in self.flat.inputs))
        return {spec.name: value for spec, value in zip(self.flat.outputs, results, strict=True)}


class Cached:
    """A model with a step cache; looks like an engine to `CachedRun`."""

    def __init__(self, flat: FlatProgram, cut: Cut, text: str) -> None:
        policy = parse(text)
        made = with_cache(flat, cut, policy, "straight")
        self._programs = {name: _Program(part) for name, part in made.programs.items()}
        self.manifest = SimpleNamespace(cache={"policy": text}, state=made.state)
        self.programs = tuple(self._programs)
        self.inputs = flat.inputs
        self.state_bytes = made.state_bytes
        self.looks_back = _looks_back(policy.payload)

    def program(self, name: str) -> _Program:
        """One of `programs`."""
        return self._programs[name]

    def start(self, steps: int, mask: str | None = None) -> CachedRun:
        """Begin a run."""
        return CachedRun(cast("Engine", self), steps, mask=mask)


def _looks_back(payload: Payload) -> int:
    """How many of the computed calls before it a reused one depends on; the run's length where it may be all.

    Taylor's weights depend on how far apart calls are, those of other forecasts on the calls' numbers in the run.
    """
    if isinstance(payload, (Residual, Value)):
        return 1
    return payload.history if isinstance(payload, Taylor) else sys.maxsize


@dataclass
class Trials:
    """The same runs with and without a cache: what masks and policies do to the results.

    The runs without one are made once, and what they predicted is kept: a mask's calls before its first reuse need not
    be made again.
    """

    runs: Runs
    flat: FlatProgram
    plain: Denoise
    _plain: dict[Draw, tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict)

    def uncached(self, draw: Draw) -> torch.Tensor:
        """The result of a run that computes every call."""
        if draw not in self._plain:
            predictions: list[torch.Tensor] = []

            def denoise(*tensors: torch.Tensor) -> torch.Tensor:
                predictions.append(self.plain(*tensors))
                return predictions[-1]

            self._plain[draw] = self.runs.run(denoise, draw), predictions
        return self._plain[draw][0]

    def predictions(self, draw: Draw) -> list[torch.Tensor]:
        """What the model predicted at each call of the run that computes them all."""
        self.uncached(draw)
        return self._plain[draw][1]

    def forced(self, cached: Cached, draw: Draw, mask: str) -> float:
        """The mean squared error of a run with a forced mask."""
        expected = self.uncached(draw)
        if "0" not in mask:
            return 0.0
        known = max(0, mask.index("0") - cached.looks_back)
        run = cached.start(len(mask) - known, mask[known:])
        denoise = _Replayed(self.predictions(draw)[:known], self._denoise(run))
        return _error(self.runs.run(denoise, draw), expected)

    def free(self, cached: Cached, draw: Draw) -> tuple[float, str]:
        """The mean squared error of a run that the policy decides on, and what it did."""
        expected = self.uncached(draw)
        run = cached.start(self.runs.steps)
        return _error(self.runs.run(self._denoise(run), draw), expected), run.mask

    def _denoise(self, run: CachedRun) -> Denoise:
        names = [spec.name for spec in self.flat.inputs]
        types = [example.dtype for example in self.flat.example_inputs]

        def denoise(*tensors: torch.Tensor) -> torch.Tensor:
            given: Mapping[str, Any] = {n: t.to(d) for n, t, d in zip(names, tensors, types, strict=True)}
            result: torch.Tensor = next(iter(run(**given).values()))
            return result

        return denoise


class _Replayed:
    """Give the predictions that are known, then call the model."""

    def __init__(self, known: list[torch.Tensor], denoise: Denoise) -> None:
        self._known, self._denoise = iter(known), denoise

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        known = next(self._known, None)
        return self._denoise(*tensors) if known is None else known


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).square().mean())
