"""The processes that share a Picard run: the one that was started, and those that it starts.

All of them hold the same engine, and do what the first says: measure a call, make a run, or stop. A process that ends
before that ends the run of all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hasten.backends.picard_processes import wait
from hasten.errors import HastenError
from hasten.passes.solvers.picard_loop import Picard
from hasten.tools.picard_member import TIMEOUT, Member, Settings

MEASURE, RUN, STOP = range(3)
SETTINGS = "settings.json"
LEAVE = 30.0
"""Seconds that the others have to end when they are told to."""


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
