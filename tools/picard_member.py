"""What one process of a Picard run holds: the engine, the table and the conditions; and what it does with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hasten.backends.engine import Engine, load
from hasten.backends.picard_engine import Sweeper, picard_engine
from hasten.backends.picard_processes import picard_processes, wait
from hasten.passes.solvers.names import SCALE
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.picard_loop import Picard
from hasten.passes.solvers.plan import NEGATIVE
from hasten.passes.solvers.table import SolverTable

TIMEOUT = 300.0
"""Seconds to wait for another process."""
CALLS = 5
"""Timed calls of a measurement."""


class Network:
    """An engine of a fixed batch, called with any number of samples up to ``samples``; the rest is filled up.

    ``null`` (...) is the condition of the unguided half, or None where nothing guides.
    """

    def __init__(self, engine: Engine, samples: int, null: torch.Tensor | None, guidance: float) -> None:
        self.engine, self.samples, self.null, self.guidance = engine, samples, null, guidance
        self._names = [t.name for t in engine.inputs]

    def __call__(self, y: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        given = [_filled(a, self.samples) for a in (y.float(), t.float(), condition)]
        if self.null is not None:
            untold = self.null.expand(self.samples, *self.null.shape)
            given = [torch.cat([a, b]) for a, b in zip(given, (given[0], given[1], untold), strict=True)]
        made: torch.Tensor = next(iter(self.engine(**dict(zip(self._names, given, strict=True))).values())).float()
        if self.null is not None:
            told, without = made.chunk(2)
            made = without + self.guidance * (told - without)
        return made[: len(y)]


def _filled(array: torch.Tensor, samples: int) -> torch.Tensor:
    return torch.cat([array, array[:1].expand(samples - len(array), *array.shape[1:])])


@dataclass(frozen=True)
class Settings:
    """What a process must know to take its part; all of it can be written as JSON.

    ``engine`` is the directory of an engine of the network for ``samples`` rows of the sampler's pictures at once, or,
    ``compiled``, of a `PicardWindow`: then there is one process.
    """

    engine: str
    model: str
    samples: int
    labels: tuple[int, ...]
    guidance: float
    solver: str | None
    steps: int
    window: int
    tolerance: float
    acceleration: int
    processes: int
    threads: int
    compiled: bool = False


class Member:
    """One process's network, and what it does with it. The group is there if there are several."""

    def __init__(self, settings: Settings) -> None:
        from hasten.models.registry import get
        from hasten.models.scenes.adapters import specification
        from hasten.models.scenes.generate import solver
        from hasten.models.scenes.subject import subject
        from hasten.tools.generate_loop import table_of

        self.settings, adapter = settings, get(settings.model)
        drawn = subject(specification(settings.model))
        labels = torch.tensor(settings.labels)
        self.conditions = drawn.condition(labels)
        null = drawn.condition(torch.full_like(labels[:1], drawn.null_class))[0]
        self.null = None if settings.guidance == 1 else null
        onnx = settings.processes > 1 and load(settings.engine).target.backend == "onnxruntime"
        self.engine = load(settings.engine, threads=settings.threads) if onnx else load(settings.engine)
        self.network = Network(self.engine, settings.samples, self.null, settings.guidance)
        name = adapter.inputs[2].name
        self.told: dict[str, Any] = {name: self.conditions}
        if self.null is not None:
            self.told |= {NEGATIVE + name: self.null.expand(self.conditions.shape), SCALE: settings.guidance}
        named, steps = settings.solver, settings.steps
        self.table: SolverTable = solver(adapter, steps) if named is None else table_of(adapter, named, steps)
        self.shape = (len(labels), *adapter.inputs[0].shape[1:])

    def measure(self) -> float:
        """Seconds of the calls of a full sweep, the slowest process's; of all of it where it is compiled."""
        sweep = self._compiled_sweep() if self.settings.compiled else self._network_call()
        seconds = []
        with torch.no_grad():
            for number in range(CALLS + 1):  # the first warms up
                started = time.perf_counter()
                sweep()
                seconds += [time.perf_counter() - started] if number else []
        slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
        if self.settings.processes > 1:
            wait(dist.all_reduce(slowest, dist.ReduceOp.MAX, async_op=True), TIMEOUT, None)
        return float(slowest)

    def _network_call(self) -> Callable[[], object]:
        y = torch.zeros(self.settings.samples, *self.shape[1:])
        times, condition = torch.full((len(y),), float(self.table.time[0])), torch.cat([self.conditions[:1]] * len(y))
        return lambda: self.network(y, times, condition)

    def _compiled_sweep(self) -> Callable[[], object]:
        x = torch.zeros(self.shape)
        sweeper = Sweeper(self.engine, self.table, [x] * len(self.table.noisy), **self.told)
        states = [sweeper.first(x)] * (sweeper.window + 1)
        return lambda: sweeper(range(sweeper.window), states, exact=self.settings.tolerance == 0)

    def run(self, x: torch.Tensor, noise: Sequence[torch.Tensor]) -> Picard:
        """Sample from unit noise ``x``; that of the first process counts."""
        s = self.settings
        options: dict[str, Any] = {"window": s.window, "tolerance": s.tolerance, "acceleration": s.acceleration}
        with torch.no_grad():
            if s.processes > 1:
                shared = {"conditions": [self.conditions], "noise": noise, **options}
                return picard_processes(self.network, self.table, x, **shared)
            if s.compiled:
                return picard_engine(self.engine, self.table, x, noise=noise, **options, **self.told)

            def told(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return self.network(y, t, torch.cat([self.conditions] * (len(y) // len(x))))

            return picard(told, self.table, x, noise=noise, **options)
