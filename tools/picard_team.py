"""The processes that share a Picard run: the one that was started, and those that it starts.

All of them hold the same engine, and do what the first says: measure a call, make a run, or stop. A process that ends
before that ends the run of all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hasten.backends.engine import Engine, load
from hasten.backends.picard_processes import picard_processes, wait
from hasten.errors import HastenError
from hasten.passes.solvers.picard import Picard, picard
from hasten.passes.solvers.table import SolverTable

MEASURE, RUN, STOP = range(3)
SETTINGS = "settings.json"
TIMEOUT = 300.0
CALLS = 5
"""Timed calls of a measurement."""
LEAVE = 30.0
"""Seconds that the others have to end when they are told to."""


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

    ``engine`` is the directory of an engine of the network for ``samples`` rows of the sampler's pictures at once.
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
        onnx = settings.processes > 1 and load(settings.engine).target.backend == "onnxruntime"
        engine = load(settings.engine, threads=settings.threads) if onnx else load(settings.engine)
        self.network = Network(engine, settings.samples, None if settings.guidance == 1 else null, settings.guidance)
        named, steps = settings.solver, settings.steps
        self.table: SolverTable = solver(adapter, steps) if named is None else table_of(adapter, named, steps)
        self.shape = (len(labels), *adapter.inputs[0].shape[1:])

    def measure(self) -> float:
        """Seconds of the calls of a full sweep, the slowest process's."""
        y = torch.zeros(self.settings.samples, *self.shape[1:])
        condition = torch.cat([self.conditions[:1]] * len(y))
        seconds = []
        with torch.no_grad():
            for number in range(CALLS + 1):  # the first warms up
                started = time.perf_counter()
                self.network(y, torch.full((len(y),), float(self.table.time[0])), condition)
                seconds += [time.perf_counter() - started] if number else []
        slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
        if self.settings.processes > 1:
            wait(dist.all_reduce(slowest, dist.ReduceOp.MAX, async_op=True), TIMEOUT, None)
        return float(slowest)

    def run(self, x: torch.Tensor, noise: Sequence[torch.Tensor]) -> Picard:
        """Sample from unit noise ``x``; that of the first process counts."""
        s = self.settings
        options: dict[str, Any] = {"window": s.window, "tolerance": s.tolerance, "acceleration": s.acceleration}
        with torch.no_grad():
            if s.processes > 1:
                shared = {"conditions": [self.conditions], "noise": noise, **options}
                return picard_processes(self.network, self.table, x, **shared)

            def told(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return self.network(y, t, torch.cat([self.conditions] * (len(y) // len(x))))

            return picard(told, self.table, x, noise=noise, **options)


@contextmanager
def team(settings: Settings) -> Iterator[Team]:
    """Start the other processes and make this one the first; they end with the block."""
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="hasten-picard-") as folder:
        others = [_start(settings, rank, Path(folder)) for rank in range(1, settings.processes)]
        try:
            if others:
                _join(0, settings, Path(folder))
            made = Team(Member(settings))
            yield made
            made.stop(others)
        finally:
            torch.set_num_threads(before)
            for process in others:
                process.kill()  # before the group: what still waits for it would tell of a lost connection
                process.wait()
            if dist.is_initialized() and others:
                dist.destroy_process_group()


class Team:
    """All the processes, as the first sees them."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def measure(self) -> float:
        """Seconds of a full sweep's calls, all processes at once."""
        with self._all(MEASURE):
            return self.member.measure()

    def run(self, x: torch.Tensor, noise: Sequence[torch.Tensor]) -> Picard:
        """Sample from unit noise ``x``."""
        with self._all(RUN):
            return self.member.run(x, noise)

    def stop(self, others: Sequence[subprocess.Popen[bytes]]) -> None:
        """Tell ``others`` that nothing more will be asked, and wait for their end."""
        with self._all(STOP):
            for process in others:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVE)

    @contextmanager
    def _all(self, word: int) -> Iterator[None]:
        """Tell the others what to do too, and leave them the processors that they were promised."""
        before = torch.get_num_threads()
        try:
            if self.member.settings.processes > 1:
                torch.set_num_threads(self.member.settings.threads)
                wait(dist.broadcast(torch.tensor(word), 0, async_op=True), TIMEOUT, None)
            yield
        finally:
            torch.set_num_threads(before)


def command(rank: int, folder: Path) -> list[str]:
    """How another process is started."""
    return [sys.executable, "-m", __name__, str(rank), str(folder)]


def _start(settings: Settings, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    (folder / SETTINGS).write_text(json.dumps(asdict(settings)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    return subprocess.Popen(command(rank, folder), env=environment, stdout=subprocess.DEVNULL)


def _join(rank: int, settings: Settings, folder: Path) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=(folder / "store").as_uri(),
            rank=rank,
            world_size=settings.processes,
            timeout=timedelta(seconds=TIMEOUT),
        )
    except (RuntimeError, ValueError) as error:
        raise HastenError(
            f"Picard over {settings.processes} processes: they did not find each other ({error}); start again"
        ) from error


def main(rank: int, folder: Path) -> None:
    """Another process: do what the first says until it says to stop."""
    told = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    settings = Settings(**{**told, "labels": tuple(told["labels"])})
    torch.set_num_threads(settings.threads)
    _join(rank, settings, folder)
    member = Member(settings)
    nothing = torch.zeros(member.shape)
    word = torch.zeros((), dtype=torch.int64)
    while True:
        dist.broadcast(word, 0)
        if int(word) == STOP:
            break
        if int(word) == MEASURE:
            member.measure()
        else:
            member.run(nothing, [nothing] * len(member.table.noisy))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
