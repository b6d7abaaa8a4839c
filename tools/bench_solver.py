"""``hasten bench MODEL --solver A,B --steps 5,10``: wall clock against quality of solvers, step counts and step caches.

One engine for each model and step cache holds the whole sampler and serves every solver; all runs take turns. Quality
is PSNR to a fine solution of the model's equation from the same noise, 125 steps of DPM-Solver++(2M) unless told
otherwise, and how often the independent classifier names what was asked for. A solver that adds noise makes another
picture on purpose: it has no PSNR.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.errors import UsageError
from hasten.tools import bench_lines
from hasten.tools.bench_machine import processor, versions
from hasten.tools.bench_sweep import GUIDANCE, Panel, adapters, draw, labels_of, right, rounds, thresholds_of
from hasten.tools.console import Console, duration, table
from hasten.tools.generate_loop import LoopDenoise, table_of
from hasten.tools.quality import psnr

if TYPE_CHECKING:
    import torch

    from hasten.backends.sampling import Sampling
    from hasten.models.adapter import Adapter
    from hasten.passes.solvers.table import SolverTable

FINE = "dpm++2m:compat=none"
STEPS = (10, 20, 50)


@dataclass(frozen=True)
class Setting:
    """One point. ``seconds`` are those of whole runs; ``evaluations`` are of the network, without what a cache reused.

    ``psnr_db`` is None where the solver adds noise (``stochastic``), or makes the fine solution itself.
    """

    model: str
    solver: str
    steps: int
    cache: str | None
    threshold: float | None
    evaluations: int
    seconds: Mapping[str, Any]
    stochastic: bool
    psnr_db: float | None
    accuracy: float


class Case(NamedTuple):
    """What one run is: a solver's text, its number of steps, a step cache and its threshold."""

    solver: str
    steps: int
    cache: str | None
    threshold: float | None


def names_of(texts: Iterable[str]) -> list[str]:
    """The solvers of lists with commas between them; an option goes to the solver before it.

    >>> names_of(["ddim,unipc:order=3,levels=karras", "heun"])
    ['ddim', 'unipc:order=3,levels=karras', 'heun']
    """
    from hasten.passes.solvers.catalog import parse

    found: list[str] = []
    for text in texts:
        for number, word in enumerate(text.split(",")):
            if number and "=" in word and ":" not in word.partition("=")[0]:
                found[-1] += f"{',' if ':' in found[-1] else ':'}{word}"
            else:
                found.append(word)
    for name in found:
        parse(name)
    return list(dict.fromkeys(found))


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure every solver at every number of steps, with and without every cache; show, write, draw."""
    solvers, steps = names_of(args.solver), args.steps or STEPS
    common = {
        "guidance": GUIDANCE,
        "count": args.count,
        "seed": args.seed,
        "rounds": args.rounds,
        "target": args.cache_target,
        "fine": {"solver": FINE, "steps": args.fine},
        "device": processor(),
        "versions": versions(),
    }
    found: list[Setting] = []
    for adapter in adapters(args, "--solver"):
        tables = {(name, n): _table(adapter, name, n) for name in solvers for n in steps}
        found += _settings(adapter, tables, args, console)
    if args.jsonl is not None:
        bench_lines.append(args.jsonl, ({**asdict(s), **common} for s in found))
    console.document({**common, "settings": [asdict(s) for s in found]})
    console.show(_shown(found))
    console.show(
        f"runs of {args.count}, guidance {GUIDANCE:g}, {args.rounds} of each in turns, on {common['device']}; PSNR to "
        f"{args.fine} steps of {FINE} from the same noise"
    )
    if args.plot is not None:
        draw(_panels(found), args.plot)
        console.show("", f"wrote {args.plot}")
    return 0


def _table(adapter: Adapter, solver: str, steps: int) -> SolverTable:
    made = table_of(adapter, solver, steps)
    if made.network.any():
        raise UsageError(
            f"--solver {solver}: it asks two networks, and the sweep's engines hold one; `hasten generate` builds one "
            "with both"
        )
    return made


def _settings(
    adapter: Adapter, tables: Mapping[tuple[str, int], SolverTable], args: argparse.Namespace, console: Console
) -> list[Setting]:
    import tempfile

    from hasten.backends.build import build

    fine = table_of(adapter, FINE, args.fine)
    policies = [None, *(args.cache or ())]
    _check_caches(policies, tables)
    sampling = _sampling([*tables.items(), ((FINE, args.fine), fine)])
    denoisers: dict[str | None, LoopDenoise] = {}
    with ExitStack() as stack:
        for policy in policies:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hasten-bench-"))
            with console.progress(f"building {adapter.name}" + (f" with {policy}" if policy else "")) as tell:
                engine = build(
                    adapter,
                    target=args.cache_target,
                    out=Path(folder) / "engine",
                    cache=policy,
                    sampling=sampling,
                    progress=tell,
                )
            denoisers[policy] = LoopDenoise(engine, adapter)
        labels = labels_of(adapter, args.count)
        with console.progress(f"the fine solution of {adapter.name}"):
            solution = denoisers[None].generate(labels, solver=fine, seed=args.seed)
        cases = [
            Case(solver, steps, policy, threshold)
            for policy in policies
            for threshold in ([None] if policy is None else thresholds_of(policy, args.thresholds))
            for solver, steps in tables
        ]

        def sample(case: Case) -> tuple[torch.Tensor, str]:
            options = {} if case.threshold is None else {"threshold": case.threshold}
            found = tables[case.solver, case.steps]
            sampled = denoisers[case.cache].sample(labels, solver=found, seed=args.seed, **options)
            return sampled.latents, sampled.decisions

        with console.progress(f"sampling {adapter.name}") as tell:
            made, times = rounds({case: partial(sample, case) for case in cases}, args.rounds, tell)
        found = []
        for case in cases:
            latents, decisions = made[case]
            pictures, solver = denoisers[case.cache].pixels(latents), tables[case.solver, case.steps]
            noisy = bool(solver.noisy)
            found.append(
                Setting(
                    model=adapter.name,
                    solver=case.solver,
                    steps=case.steps,
                    cache=case.cache,
                    threshold=case.threshold,
                    evaluations=decisions.count("1") if case.cache else len(solver),
                    seconds=times[case].as_dict(),
                    stochastic=noisy,
                    psnr_db=None if noisy else psnr(solution, pictures),
                    accuracy=right(pictures, labels),
                )
            )
        return found


def _check_caches(policies: Sequence[str | None], tables: Mapping[tuple[str, int], SolverTable]) -> None:
    """Refuse a calibration or a mask of another number of calls before an engine is built."""
    from hasten.backends.step_cache import Caching

    for policy in policies:
        if (caching := Caching.of(policy, looped=True)) is not None:
            for made in tables.values():
                caching.check_calls(len(made))


def _sampling(tables: Sequence[tuple[tuple[str, int], SolverTable]]) -> Sampling:
    """One engine for all: the largest bounds, and what the solvers do to x0."""
    from hasten.backends.sampling import Sampling

    hooks = {made.hook.kind for _, made in tables if made.hook is not None}
    if len(hooks) > 1:
        raise UsageError("--solver: an engine clips x0 or thresholds it, not both; sweep over these in two runs")

    def neediest(entry: tuple[tuple[str, int], SolverTable]) -> tuple[bool, float]:
        hook = entry[1].hook
        return hook is not None, -float(getattr(hook, "ratio", 0.0))

    (solver, steps), _ = max(tables, key=neediest)
    return Sampling(
        solver,
        steps,
        guidance=GUIDANCE,
        noise="input" if any(made.noisy for _, made in tables) else "none",
        rows=max(len(made) for _, made in tables),
        history=max(made.width for _, made in tables),
    )


def _shown(settings: Sequence[Setting]) -> Any:
    shown = table("model", "solver", "cache", ">steps", ">evaluations", ">a run", ">p20 to p80", ">PSNR", ">right")
    for s in settings:
        shown.add_row(
            s.model,
            s.solver,
            _cache(s),
            str(s.steps),
            str(s.evaluations),
            duration(s.seconds["median"]),
            f"{duration(s.seconds['p20'])} to {duration(s.seconds['p80'])}",
            "adds noise" if s.stochastic else "identical" if s.psnr_db is None else f"{s.psnr_db:.1f} dB",
            f"{s.accuracy:.1%}",
        )
    return shown


def _cache(setting: Setting) -> str:
    if setting.cache is None:
        return ""
    at = "" if setting.threshold is None else f" at {setting.threshold:g}"
    return setting.cache.partition(",")[0] + at


def _panels(settings: Sequence[Setting]) -> list[Panel]:
    """Of each model PSNR and accuracy against wall clock, a line for each solver and cache."""
    made = []
    for model in dict.fromkeys(s.model for s in settings):
        fidelity: dict[str, list[tuple[float, float]]] = {}
        accuracy: dict[str, list[tuple[float, float]]] = {}
        for s in (s for s in settings if s.model == model):
            label = s.solver + (f", {_cache(s)}" if s.cache else "")
            accuracy.setdefault(label, []).append((s.seconds["median"], 100 * s.accuracy))
            if s.psnr_db is not None:
                fidelity.setdefault(label, []).append((s.seconds["median"], s.psnr_db))
        made.append(Panel(model, "seconds a run", "PSNR to the fine solution, dB", fidelity))
        made.append(Panel(model, "seconds a run", "right, %", accuracy))
    return made
