"""One implementation of one work, from an empty process to one that can be asked for times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.tools.bench_implementations import Implementation
from hasten.tools.bench_process import WorkerProcess
from hasten.tools.bench_row import Row
from hasten.tools.bench_works import Work


@dataclass(frozen=True)
class Settings:
    """What holds for every work of a run. ``rtol`` bounds the relative error, ``timeout`` one answer of a worker."""

    threads: int
    cpus: tuple[int, ...] | None
    rounds: int
    warmup: int
    max_seconds: float
    timeout: float
    rtol: float
    seed: int = 0
    dtype: str = "float32"
    malloc: str = "keep"
    baseline: str | None = None


class Contender:
    """A row, and the process that fills it."""

    def __init__(self, work: Work, implementation: Implementation, settings: Settings, folder: Path) -> None:
        self.row = Row(work.word, implementation)
        self.outputs: list[str] = []
        self._work, self._settings, self._folder = work, settings, folder
        self._process: WorkerProcess | None = None

    def prepare(self) -> None:
        """Build where there is something to build, open, call once; the process stays."""
        made = self.row.implementation
        self._folder.mkdir()
        started = time.perf_counter()
        if made.build is not None:
            self._start()
            self.row.grow(self._make("build", made.build, made.build_options)["peak_bytes"])
            self.close()
        self._start()
        answer = self._make("prepare", made.open, made.open_options)
        self.row.grow(answer["peak_bytes"])
        self.row.prepare_seconds = time.perf_counter() - started
        self.outputs = answer["outputs"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request to the process."""
        assert self._process is not None
        return self._process.ask({"do": do, **request}, self._settings.timeout)

    def close(self) -> None:
        """Release the process; nothing where there is none."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _start(self) -> None:
        s = self._settings
        self._process = WorkerProcess(self._folder, threads=s.threads, cpus=s.cpus, malloc=s.malloc)

    def _make(self, do: str, function: str, options: Any) -> dict[str, Any]:
        subject = {
            "word": self._work.word,
            "weights": None if self._work.weights is None else str(self._work.weights),
            "seed": self._settings.seed,
            "dtype": self._settings.dtype,
            "device": self.row.implementation.device,
            "threads": self._settings.threads,
        }
        folder = str(self._folder)
        return self.ask(do, function=function, subject=subject, folder=folder, options=dict(options))
