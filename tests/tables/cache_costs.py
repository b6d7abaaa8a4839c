"""What a step cache costs beside what it saves: reused steps, decisions and memory, on a bundled model.

``python tests/tables/cache_costs.py [--model NAME]``: for each policy the engine that ``hasten build --cache`` makes,
and beside it the engine without a cache and the decision as an engine of its own, called in turns; times are medians,
and a decision's is less that of an engine which adds one to a number. What a policy leaves in a reused step (the ends
of the model, a probe's first blocks) is the part of the operations outside its region. Memory is the growth of the
process while many runs keep their state, a run, after the allocator has given back what is free, beside the bytes that
the manifest predicts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import hasten
from hasten.models.registry import get
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.policy import Control

ONES = "1" * 50
POLICIES = (
    "teacache:threshold=0.15,coefficients=1/0",
    "first-block:threshold=0.2",
    "easycache:threshold=0.05",
    "adacache:codebook=30-fast",
    f"mask:bits={ONES}",
    f"mask:bits={ONES},payload=taylor,order=2",
    f"mask:bits={ONES},granularity=output,payload=taylor",
    "spectrum",
    "spectrum:granularity=output",
)
CALLS = 200
"""More than are made: a run must know how many it has."""
HELD = 48
"""Runs that keep their state at once."""
Inputs = Mapping[str, torch.Tensor]


class Decision(nn.Module):
    """A policy's decision and nothing else: state, signal and controls in, the next state and the answer out."""

    def __init__(self, policy: str, names: list[str], signal: bool) -> None:
        super().__init__()
        self.decision, self.names, self.signal = parse(policy).decision, names, signal

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = dict(zip(self.names, given, strict=False))
        rest = given[len(self.names) :]
        following, compute = self.decision.decide(state, rest[0] if self.signal else None, Control(*rest[-5:]))
        changed = [v for n, v in following.items() if v is not state[n]]
        return compute, *(v.clone() if any(v is g for g in given) else v for v in changed)


class Next(nn.Module):
    """What an engine can do least."""

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        return step + 1


class Bench:
    """Engines by what they were built with, and the inputs of one call."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.adapter = replace(get(args.model), batch=args.batch)
        self.inputs: dict[str, torch.Tensor] = self.adapter.example_inputs()

    def engine(self, name: str, source: Any = None, **options: Any) -> hasten.Engine:
        """The model's, or that of ``source``; built once, then loaded."""
        target = self.args.target.replace(":", "-")
        out = self.folder / f"costs-{self.adapter.name}-{target}-{self.args.batch}-{name}"
        if not out.exists():
            hasten.build(source or self.adapter, target=self.args.target, out=out, **options)
        threads = {"threads": self.args.threads} if self.args.target.startswith("onnxruntime") else {}
        # The state that goes from call to call is not looked at, and for a decision alone it is an input like others.
        return hasten.load(out, check_inputs=source is None, **threads)

    def decision(self, name: str, text: str, state: Inputs) -> Callable[[], object] | None:
        """The decision alone, on the state of a run; None where decisions are known before a run."""
        policy = parse(text)
        names = list(policy.decision.slots())
        if policy.decision.mask(2) is not None:
            return None
        held = [state[f"cache_{n}"] for n in names]
        like = {"modulated": "previous", "input": "previous", "probe": "reference"}.get(policy.decision.signal)
        signal = [] if like is None else [state[f"cache_{like}"] * 1.01]
        control = [torch.tensor(v) for v in (3, 50, -1)]
        control += [torch.tensor(policy.decision.threshold), torch.tensor(policy.decision.limit)]
        examples = (*held, *signal, *control)
        engine = self.engine(name, Decision(text, names, bool(signal)), example_inputs=examples)
        given = {t.name: examples[int(t.name.rpartition("_")[2])] for t in engine.inputs}
        return lambda: engine(**given)

    def call(self) -> Callable[[], object]:
        """The call of an engine that does next to nothing."""
        engine, step = self.engine("call", Next(), example_inputs=(torch.tensor(3),)), torch.tensor(3)
        (name,) = (t.name for t in engine.inputs)
        return lambda: engine(**{name: step})


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, all in turns, forwards and backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            began = time.perf_counter()
            calls[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: median(found) for name, found in seconds.items()}


def held(engine: hasten.Engine, inputs: Inputs) -> float:
    """Bytes by which the process grows for each run that keeps its state."""

    def begin() -> hasten.CachedRun:
        run = engine.start(CALLS, mask="1" * CALLS)
        for _ in range(2):
            run(force=1, **inputs)
        return run

    kept = [begin() for _ in range(4)]  # what grows once
    before = _resident()
    kept += [begin() for _ in range(HELD)]
    return (_resident() - before) / HELD


def _resident() -> int:
    """Bytes of memory of this process that are in use: what is free in the C library's heap is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def row(bench: Bench, number: int, text: str) -> list[str]:
    """The cells of one policy."""
    engine, inputs = bench.engine(str(number), cache=text), bench.inputs
    cache = engine.manifest.cache
    assert cache is not None
    plain, run = bench.engine("plain"), engine.start(CALLS, mask="1" * CALLS)
    for _ in range(3):
        run(force=1, **inputs)
    calls: dict[str, Callable[[], object]] = {
        "uncached": lambda: plain(**inputs),
        "computed": lambda: run(force=1, **inputs),
        "reused": lambda: run(force=0, **inputs),
    }
    alone = bench.decision(f"{number}-decision", text, run.state())
    if alone is not None:
        calls |= {"decision": alone, "call": bench.call()}
    found = medians(calls, bench.args.rounds)
    grown, state = held(engine, inputs), cache["state_bytes"]
    cells = [text.replace(ONES, "…"), cache["form"]]
    cells += [f"{found[name] * 1e3:.2f}" for name in ("uncached", "computed")]
    cells += [f"{found['reused'] * 1e3:.3f}", f"{found['reused'] / found['computed']:.2%}", f"{1 - cache['share']:.2%}"]
    decided = found["decision"] - found["call"] if alone is not None else None
    cells += ["none", ""] if decided is None else [f"{decided * 1e3:.3f}", f"{decided / found['computed']:.2%}"]
    cells += [f"{found['call'] * 1e3:.3f}" if alone is not None else ""]
    return [*cells, f"{state / 1e3:.1f}", f"{grown / 1e3:.1f}", f"{grown / state:.3f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes-dit")
    parser.add_argument("--target", default="onnxruntime:cpu")
    parser.add_argument("--batch", type=int, default=16, help="of the model, twice the pictures")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", type=Path, help="keep engines here, and take those that are there")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    names = "cache, form, uncached ms, computed ms, reused ms, of it, outside the region, decision ms, of it, call ms, "
    columns = f"{names}state kB, held kB a run, held / state".split(", ")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, args.engines or Path(folder))
        for number, text in enumerate(args.policies):
            print(f"| {' | '.join(row(bench, number, text))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
