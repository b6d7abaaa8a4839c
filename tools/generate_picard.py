"""``hasten generate MODEL --picard …``: rows of the sampler at once, where that is predicted to be faster."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.backends import processors
from hasten.errors import UsageError
from hasten.passes.steps.options import Option, Request, read_all
from hasten.tools.console import Console, duration
from hasten.tools.generate_cached import RUNS
from hasten.tools.quality import psnr
from hasten.tools.timing import take_turns

if TYPE_CHECKING:
    from hasten.models.adapter import Adapter
    from hasten.passes.solvers.picard_loop import Picard
    from hasten.passes.solvers.table import SolverTable

OPTIONS: Mapping[str, Option] = {
    "tolerance": Option("number", "how much a settled state may change, 0.1 in ParaDiGMS", 0.1, low=0.0),
    "exact": Option("flag", "wait until nothing changes: the plain loop's result", default=False),
    "window": Option("integer", "rows at once", 8, low=1),
    "acceleration": Option("integer", "earlier sweeps that guesses are made from", 0, low=0, high=8),
    "processes": Option("integer", "processes that share the window", 1, low=1, high=64),
    "force": Option("flag", "run it where it is predicted to be slower", default=False),
}


def request(text: str) -> Request:
    """Read ``tolerance=0.1,window=8,…``.

    >>> request("window=4").options["tolerance"]
    0.1
    """
    given = dict[str, str]()
    for item in text.split(",") if text else ():
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(f"picard: option {item!r} is not written key=value")
        if key in given:
            raise UsageError(f"picard: option {key!r} is given twice")
        given[key] = value
    options = read_all("picard", OPTIONS, given)
    if options["exact"]:
        if "tolerance" in given:
            raise UsageError("picard: exact=true waits until nothing changes, and tolerance is not for it; give one")
        options["tolerance"] = 0.0
    elif options["tolerance"] == 0:
        raise UsageError("picard: tolerance: 0 was given; it is above 0; exact=true makes the plain loop's result")
    elif options["tolerance"] == math.inf:
        raise UsageError("picard: tolerance: inf was given, with which nothing is ever waited for; 0.1 is usual")
    return Request("picard", options)


def run(
    args: argparse.Namespace, adapter: Adapter, labels: list[int], chosen: str, folder: Path, console: Console
) -> int:
    """Build, measure, predict, and where it pays: run, compare, write."""
    import torch

    from hasten.backends.sampler_run import Draw
    from hasten.models.scenes.adapters import specification
    from hasten.models.scenes.generate import generate, solver
    from hasten.models.scenes.subject import subject
    from hasten.passes.solvers.picard_gain import predicted_gain
    from hasten.passes.solvers.sample import sample
    from hasten.tools import generate as verb
    from hasten.tools import picard_build
    from hasten.tools.generate_loop import table_of
    from hasten.tools.picard_member import Network, Settings
    from hasten.tools.picard_team import team

    asked = request(args.picard)
    options = asked.options
    for name, unfit in (("--cache", args.cache is not None), ("--target inductor:cpu", chosen == "inductor:cpu")):
        if unfit:
            raise UsageError(f"--picard asks an engine for many rows at once; {name} is not for that, leave one out")
    found = solver(adapter, args.steps) if args.solver is None else table_of(adapter, args.solver, args.steps)
    window, processes = min(options["window"], len(found)), options["processes"]
    sweeps = _sweeps(found, window, options, args.solver)
    samples = -(-window * len(labels) // processes)
    compiled = processes == 1 and found.hook is None  # processes share a call of the network, and hooks are the host's
    with console.progress("building the engines of one row and of the window") as tell:
        one = picard_build.of_network(adapter, len(labels), chosen, folder, args, tell)
        if compiled:
            several = picard_build.of_window(adapter, len(labels), window, found, chosen, folder, args, tell)
        else:
            several = picard_build.of_network(adapter, samples, chosen, folder, args, tell)
    settings = Settings(
        engine=str(several.path),
        model=args.model,
        samples=samples,
        labels=tuple(labels),
        guidance=args.guidance,
        solver=args.solver,
        steps=args.steps,
        window=window,
        tolerance=options["tolerance"],
        acceleration=options["acceleration"],
        processes=processes,
        threads=max(1, processors.count() // processes),
        compiled=compiled,
    )
    draw = Draw((len(labels), *adapter.inputs[0].shape[1:]), args.seed, None)
    x, *noise = (draw() for _ in range(1 + len(found.noisy)))
    with team(settings) as others, torch.no_grad():
        conditions = others.member.conditions
        row = Network(one, len(labels), others.member.null, args.guidance)

        def denoise(y: torch.Tensor, t: float) -> torch.Tensor:
            return row(y, torch.full((len(y),), t), conditions)

        with console.progress("measuring one row and the window"):
            alone, whole = _measured(lambda: denoise(x, float(found.time[0]))), others.measure()
        where = f"over {window} of {len(found)} rows" + (f" in {processes} processes" if processes > 1 else "")
        gain = None
        if sweeps is not None:
            # a sweep of the team is one call that waits for another
            gain = predicted_gain({1: alone, window: whole}, found, window, sweeps, force=options["force"])
        where += ", each a compiled graph" if compiled else ", each a call of the network's engine"
        told = f"predicted: {sweeps} sweeps {where}: {gain}" if gain is not None else f"sweeps {where}, not predicted"
        console.show(f"{asked}", told)
        runs: list[Picard] = []

        def picard() -> torch.Tensor:
            runs.append(others.run(x, noise))
            return torch.as_tensor(runs[-1].result)

        def plain() -> torch.Tensor:
            return torch.as_tensor(sample(denoise, found, x, noise=noise))

        with console.progress("generating"):
            latents = [plain(), picard()]
            times = take_turns([plain, picard], RUNS)
    spec = specification(args.model)
    drawn = subject(spec)
    named = (f"hasten ({chosen})", f"hasten ({chosen}), Picard")
    made = dict(zip(named, (drawn.pixels(z, spec["unshuffle"]).clamp(-1, 1) for z in latents), strict=True))
    with torch.no_grad():
        eager = generate(adapter.module(), adapter, labels, guidance=args.guidance, seed=args.seed, table=found)
    pictures = {verb.BASELINE: eager, **made}
    for name, picture in pictures.items():
        verb.check_finite(name, picture)
    document = {
        "model": args.model,
        "target": chosen,
        "steps": args.steps,
        "solver": args.solver,
        "guidance": args.guidance,
        "seed": args.seed,
        "labels": labels,
        "picard": {
            **options,
            "window": window,
            "compiled": compiled,
            "rows": len(found),
            "predicted_sweeps": sweeps,
            "sweeps": runs[0].sweeps,
            "evaluations": runs[0].evaluations,
            "seconds_of_a_row": alone,
            "seconds_of_a_window": whole,
            "predicted_speedup": None if gain is None else gain.factor,
            "seconds": {name: t.as_dict() for name, t in zip(("plain", "picard"), times, strict=True)},
            "measured_speedup": times[0].median / times[1].median,
            "psnr_to_plain_db": psnr(*made.values()),
        },
        "results": [{"name": name, "psnr_db": psnr(eager, picture)} for name, picture in pictures.items()],
    }
    verb.write(
        [verb.Contender(name, row, picture) for name, picture in pictures.items()],
        [drawn.classes[n] for n in labels],
        document,
        folder,
        console,
    )
    console.show(*_summary(document["picard"]), "", f"wrote {', '.join(document['outputs'])}")
    return 0


def _sweeps(found: SolverTable, window: int, options: Mapping[str, Any], solver: str | None) -> int | None:
    """How many sweeps are expected, None where that is not known and the run is forced; before anything is built."""
    from hasten.passes.solvers.picard_sweeps import expected_sweeps

    if found.network.any():
        raise UsageError(
            f"--picard asks one network for many rows at once, and --solver {solver} asks two; leave one out"
        )
    try:
        return expected_sweeps(found, window, options["tolerance"], options["acceleration"])
    except UsageError:
        if not options["force"]:
            raise
        return None


def _measured(call: Callable[[], object]) -> float:
    """Seconds of a call, the median of a few behind a first that warms up."""
    call()
    return take_turns([call], 5)[0].median


def _summary(found: Mapping[str, Any]) -> list[str]:
    quality = "identical" if found["psnr_to_plain_db"] is None else f"{found['psnr_to_plain_db']:.1f} dB"
    plain, picard = (found["seconds"][name]["median"] for name in ("plain", "picard"))
    predicted = "not" if found["predicted_speedup"] is None else f"{found['predicted_speedup']:.2f}"
    return [
        f"took {found['sweeps']} sweeps and {found['evaluations']} evaluations for {found['rows']} rows: "
        f"{duration(picard)} instead of {duration(plain)}, {found['measured_speedup']:.2f} times as fast "
        f"({predicted} predicted); PSNR to the plain loop: {quality}"
    ]
