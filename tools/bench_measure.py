"""Time one work: every implementation prepared in its own process, then round by round, all of them in each round."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hasten.tools.bench_contender import Contender, Settings
from hasten.tools.bench_error import relative_error
from hasten.tools.bench_implementations import IMPLEMENTATIONS, REFERENCES, Implementation
from hasten.tools.bench_memory import available_bytes
from hasten.tools.bench_process import WorkerError
from hasten.tools.bench_row import FAILED, WRONG, Row, compare
from hasten.tools.bench_works import Work

SAMPLE = 5e-3
"""Seconds that one sample takes at least: shorter calls are repeated within it."""
SETTLE = 0.02
"""Seconds before each sample, until the threads of the process before have stopped spinning."""
COLD = 0.25
"""Works of which every call takes less than this are called once untimed before each sample: another process has had
the caches meanwhile. Longer ones hardly notice."""
LEAST = 3
"""Rounds, however long they take."""

Tell = Callable[[str, float], None]


def measure(work: Work, implementations: Sequence[Implementation], settings: Settings, tell: Tell) -> list[Row]:
    """The rows of one work, in the order of ``implementations``; every process is gone when this returns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hasten-bench-")))
        contenders = [Contender(work, made, settings, folder / made.name) for made in implementations]
        for contender in contenders:
            stack.callback(contender.close)
        extra = _prepare(work, contenders, settings, folder, tell)
        _time([c for c in contenders if c.row.status != FAILED], settings, tell)
        rows = [c.row for c in contenders]
        compare(rows, settings.baseline)
        return rows + extra


def _prepare(work: Work, contenders: Sequence[Contender], settings: Settings, folder: Path, tell: Tell) -> list[Row]:
    """Prepare one after the other and look at each one's outputs; gives the row of a reference that failed unasked."""
    failed = []
    outputs: dict[str, list[str]] = {}
    for device in sorted({c.row.implementation.device for c in contenders}):
        name = REFERENCES[device]
        contender = next((c for c in contenders if c.row.name == name), None)
        asked = contender is not None
        if contender is None:
            contender = Contender(work, IMPLEMENTATIONS[name], settings, folder / f"reference-{device}")
        tell(f"preparing {name}", 0.0)
        _guarded(contender, contender.prepare)
        outputs[device] = contender.outputs
        if not asked:
            contender.close()
            failed += [contender.row] if contender.row.status == FAILED else []
    needed = max((c.row.peak_build_bytes or 0 for c in contenders), default=0)
    for count, contender in enumerate(contenders):
        row = contender.row
        if row.name != REFERENCES[row.implementation.device]:
            tell(f"preparing {row.name}", 0.5 * count / len(contenders))
            free = available_bytes()
            if free is not None and free < needed:
                row.fail(
                    f"{free >> 20} MiB are free beside the processes before it, which needed up to {needed >> 20} MiB; "
                    "time fewer in one run with --implementations"
                )
                continue
            _guarded(contender, contender.prepare)
        needed = max(needed, row.peak_build_bytes or 0)
        if row.status != FAILED:
            _check(contender, outputs[row.implementation.device], settings.rtol)
    for file in folder.glob("*/output-*.npy"):
        file.unlink()
    return failed


def _check(contender: Contender, wanted: list[str], rtol: float) -> None:
    row = contender.row
    row.reference = REFERENCES[row.implementation.device] if wanted else ""
    if not wanted:
        return
    row.error, reason = relative_error(wanted, contender.outputs)
    if reason or (row.error or 0.0) > rtol:
        row.status = WRONG
        row.reason = (
            reason or f"its outputs differ from {row.reference}'s by {row.error:.3g} of the norm, above {rtol:g}"
        )


def _time(contenders: Sequence[Contender], settings: Settings, tell: Tell) -> None:
    """Warm every one up, then the rounds."""
    estimates = {}
    for contender in contenders:
        asked = {"calls": settings.warmup, "enough": max(2.0, settings.max_seconds / 10)}
        answer = _guarded(contender, partial(contender.ask, "warm", **asked))
        if answer is not None:
            estimates[contender.row.name] = min(answer["seconds"])
            contender.row.calls = max(1, math.ceil(SAMPLE / estimates[contender.row.name]))
    untimed = int(max(estimates.values(), default=0.0) < COLD)
    started = time.perf_counter()
    for turn in range(settings.rounds):
        if turn >= LEAST and time.perf_counter() - started > settings.max_seconds:
            break
        if turn % max(1, settings.rounds // 4) == 0:
            tell(f"round {turn + 1} of {settings.rounds}", 0.5 + 0.5 * turn / settings.rounds)
        for contender in in_turn([c for c in contenders if c.row.status != FAILED], turn):
            time.sleep(SETTLE)
            asked = {"calls": contender.row.calls, "untimed": untimed}
            answer = _guarded(contender, partial(contender.ask, "run", **asked))
            if answer is not None:
                contender.row.samples.append(answer["seconds"])
    for contender in contenders:
        if contender.row.status != FAILED and (answer := _guarded(contender, partial(contender.ask, "memory"))):
            contender.row.peak_bytes = answer["peak_bytes"]
            contender.row.device_peak_bytes = answer["device_peak_bytes"]
            contender.row.grow(answer["peak_bytes"])


def in_turn(contenders: Sequence[Contender], turn: int) -> Iterator[Contender]:
    """Everyone once, another one first in each round, and backwards every other round: no one follows the same one."""
    count = len(contenders)
    order = [contenders[(turn + i) % count] for i in range(count)]
    yield from order if turn % 2 == 0 else reversed(order)


def _guarded(contender: Contender, do: Callable[[], Any]) -> Any:
    """What ``do`` gives; a worker that fails costs its own row and no other."""
    try:
        return do()
    except WorkerError as error:
        contender.row.fail(str(error))
        contender.close()
        return None
