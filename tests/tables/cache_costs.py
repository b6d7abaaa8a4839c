"""What a step cache costs beside what it saves: reused steps, decisions and memory, on scenes-dit.

``python tests/tables/cache_costs.py``: an engine for each policy without a branch, so that the decision is a program of
its own that can be timed. Times are medians of calls in turns. Memory is the growth of the process while many runs keep
their state, a run, beside the bytes that the manifest predicts.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import hasten
from hasten.models.registry import get

POLICIES = (
    "teacache:threshold=0.15,coefficients=1/0",
    "first-block:threshold=0.2",
    "easycache:threshold=0.05",
    "adacache:codebook=30-fast",
    "mask:bits={ones}",
    "mask:bits={ones},granularity=output,payload=taylor",
    "mask:bits={ones},payload=taylor,order=2",
    "spectrum",
)
STEPS = 50
CALLS = 10_000
"""More than are made: a run must know how many it has."""
HELD = 48
"""Runs that keep their state at once."""


def costs(engine: hasten.Engine, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Seconds of a computed step, of a reused one, and of the decision alone, each as a run's own call."""
    run = engine.start(CALLS, mask="1" * CALLS)
    for _ in range(3):
        run(force=1, **inputs)
    calls: dict[str, Callable[[], object]] = {
        "computed": lambda: run(force=1, **inputs),
        "reused": lambda: run(force=0, **inputs),
    }
    if "decide" in engine.programs:
        controls = run._controls(3, None, lambda shape, dtype, value: torch.full(shape, value, dtype=_type(dtype)))
        part, given = engine.program("decide"), {**inputs, **run.state(), **controls}
        names = [t.name for t in part.inputs]
        calls["decision"] = lambda: part(**{n: given[n] for n in names})
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            calls[name]()
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(found) for name, found in seconds.items()}


def held(engine: hasten.Engine, inputs: dict[str, torch.Tensor]) -> float:
    """Bytes by which the process grows for each run that keeps its state."""

    def begin() -> hasten.CachedRun:
        run = engine.start(CALLS, mask="1" * CALLS)
        for _ in range(2):
            run(force=1, **inputs)
        return run

    kept = [begin() for _ in range(4)]  # what grows once, and what the allocator has ready
    before = _resident()
    kept += [begin() for _ in range(HELD)]
    return (_resident() - before) / HELD


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _type(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="aoti:cpu")
    parser.add_argument("--batch", type=int, default=16, help="of the model, twice the pictures")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", type=Path, help="keep engines here, and take those that are there")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    adapter = replace(get("scenes-dit"), batch=args.batch)
    inputs = adapter.example_inputs()
    print("| cache | computed ms | reused ms | of it | decision ms | of it | state kB | held kB a run | held / state |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(args.policies):
            policy = text.format(ones="1" * STEPS)
            out = (args.engines or Path(folder)) / f"costs-{args.target.replace(':', '-')}-{args.batch}-{number}"
            if not out.exists():
                hasten.build(adapter, target=args.target, out=out, cache=policy, cache_form="straight")
            engine = hasten.load(out)
            found, state = costs(engine, inputs, args.rounds), engine.manifest.cache["state_bytes"]
            grown = held(engine, inputs)
            own = [f"{found['computed'] * 1e3:.2f}"]
            for name in ("reused", "decision"):
                share = f"{found[name] / found['computed']:.2%}" if name in found else ""
                own += [f"{found[name] * 1e3:.3f}" if name in found else "none", share]
            own += [f"{state / 1e3:.1f}", f"{grown / 1e3:.1f}", f"{grown / state:.3f}"]
            print(f"| {text.format(ones='…')} | {' | '.join(own)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
