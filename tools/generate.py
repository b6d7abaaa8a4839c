"""``hasten generate``: the same pictures or clips from a bundled model, plain and optimised, and the time of each."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError, UsageError, nearest
from hasten.passes.solvers.seeds import check_seed
from hasten.tools.arguments import SOLVER_HELP, cache_options, expectations, number, one_of, target, whole
from hasten.tools.console import Console, duration, table
from hasten.tools.files import check_folder, replace, replace_text
from hasten.tools.generate_cached import CachedDenoise, summary
from hasten.tools.generate_expected import expected
from hasten.tools.generate_loop import LoopDenoise, is_guided, sampling_of, table_of
from hasten.tools.grid import write_rows
from hasten.tools.quality import psnr
from hasten.tools.timing import Times, take_turns

if TYPE_CHECKING:
    import torch

    from hasten.models.adapter import Adapter
    from hasten.models.scenes.generate import Denoise

SUMMARY = "Generate the same pictures with a bundled model, plain and optimised, and compare pictures and times."
EXAMPLES = (
    "hasten generate scenes-unet -o out/ --steps 50 --cache easycache:threshold=0.1",
    "hasten generate scenes-dit -o out/ --steps 20 --count 4 --labels 0,5,10,15 --target onnxruntime:cpu",
    "hasten generate scenes-unet -o out/ --solver dpm++2m-karras --steps 20 --target onnxruntime:cpu",
)
BASELINE = "baseline (eager PyTorch)"
AGAINST = ("inductor", "onnxruntime")
PICARD_HELP = (
    "window=8: rows of the sampler at once, again and again until they agree (tolerance=0.1, exact=true, "
    "acceleration=2, processes=2), where that is predicted to be faster (force=true)"
)
NO_COMPILER = (
    "there is no C++ compiler here (apt install g++, or set CXX), so the target is onnxruntime:cpu instead of aoti:cpu"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", metavar="MODEL", help="scenes-unet (DDIM), scenes-dit or scenes-video (Euler's method for flows)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="for pictures (clips: and a GIF), JSON and engine",
    )
    parser.add_argument("--target", type=target, help="aoti:cpu, or onnxruntime:cpu where there is no C++ compiler")
    parser.add_argument("--steps", type=whole(1), default=25, help="solver steps (default 25)")
    parser.add_argument("--solver", metavar="NAME", help=SOLVER_HELP)
    parser.add_argument("--picard", type=_picard, metavar="OPTION=VALUE,…", help=PICARD_HELP)
    parser.add_argument("--guidance", type=number, default=2.0, help="classifier-free guidance (default 2; 1: none)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the noise (default 0)")
    parser.add_argument("--count", type=whole(1), default=8, help="pictures or clips (default 8)")
    parser.add_argument(
        "--labels", type=_labels, metavar="N,…", help="classes, 0 to 15 (clips: to 47), instead of all in turn"
    )
    parser.add_argument(
        "--repeat", type=whole(1), default=20, metavar="N", help="timed steps of each, taking turns (default 20)"
    )
    parser.add_argument(
        "--against", type=_against, default=(), metavar="NAME,…", help="more baselines: inductor, onnxruntime"
    )
    parser.add_argument("--expect", type=expectations, default={}, metavar="RULE=N,…", help="as for hasten build")
    cache_options(parser)


def _labels(text: str) -> list[int]:
    words = text.split(",")
    if not all(w.isdecimal() for w in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of classes, as in 0,5,10")
    return [int(w) for w in words]


def _picard(text: str) -> str:
    from hasten.tools.generate_picard import request

    try:
        request(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _against(text: str) -> tuple[str, ...]:
    return tuple(one_of(AGAINST)(word) for word in text.split(","))


@dataclass
class Contender:
    """One way to run the model: its pictures, and the times of steps that took turns with the others'."""

    label: str
    denoise: Denoise
    pictures: Any = None
    times: Times = field(default_factory=lambda: Times(()))


def run(args: argparse.Namespace, console: Console) -> int:
    """Build, warm up, generate in turns, compare, write."""
    from hasten.models.registry import BUNDLED, get
    from hasten.models.scenes.adapters import specification
    from hasten.models.scenes.subject import subject

    if args.model not in BUNDLED:
        raise UsageError(
            f"{args.model!r} is no bundled model; there are {', '.join(BUNDLED)}.{nearest(args.model, BUNDLED)}"
        )
    classes = subject(specification(args.model)).classes
    labels = args.labels or [(21 * i) % len(classes) for i in range(args.count)]
    if max(labels) >= len(classes):
        raise UsageError(
            f"argument --labels: {','.join(map(str, labels))!r} is not a list of classes from 0 to {len(classes) - 1}, "
            "as in 0,5,10"
        )
    labels = [labels[i % len(labels)] for i in range(args.count)]
    check_seed(args.seed)
    folder = check_folder(args.output)
    chosen = _target(args.target, console)
    if is_guided(get(args.model), args.solver, args.steps):
        args.guidance = 1.0  # the network is told no class
    if args.picard is not None:
        from hasten.tools import generate_picard

        return generate_picard.run(args, get(args.model), labels, chosen, folder, console)
    network_batch = args.count * (1 if args.guidance == 1 else 2)
    adapter = dataclasses.replace(get(args.model), batch=network_batch)
    module = adapter.module()
    started = time.perf_counter()
    optimised, report = _optimised(adapter, chosen, folder, args, console)
    build_seconds = time.perf_counter() - started
    contenders = [Contender(BASELINE, module), Contender(f"hasten ({chosen})", optimised)]
    contenders += [Contender(name, _other(name, adapter, module, console)) for name in args.against]
    _generate(contenders, adapter, labels, args, console)
    _time(contenders, adapter, args.repeat, console)
    cache = _cache(optimised, adapter, labels, args)
    document = _document(contenders, args, labels, chosen, report, cache, build_seconds)
    document["outputs"] = [str(folder / args.model)]
    write(contenders[:2], [classes[n] for n in labels], document, folder, console)
    _show(contenders, document, console)
    return 0


def _target(asked: str | None, console: Console) -> str:
    from hasten.backends.inductor import have_cxx_compiler
    from hasten.backends.target import parse_target

    if asked is None:
        if have_cxx_compiler():
            return "aoti:cpu"
        console.note(NO_COMPILER)
        return "onnxruntime:cpu"
    if parse_target(asked).device != "cpu":
        raise UsageError(
            f"target {asked}: pictures are generated on the CPU; take aoti:cpu, onnxruntime:cpu or inductor:cpu"
        )
    return asked


def _optimised(
    adapter: Adapter, chosen: str, folder: Path, args: argparse.Namespace, console: Console
) -> tuple[Denoise, dict[str, Any]]:
    """The optimised network, and its report."""
    if chosen == "inductor:cpu":
        for name, value in (("cache", args.cache), ("solver", args.solver)):
            if value is not None:
                raise UsageError(f"--{name}: for engines; take --target aoti:cpu or onnxruntime:cpu")
        return _compiled(adapter, "hasten"), {}
    from hasten.backends.build import build
    from hasten.backends.step_cache import Caching

    if args.solver is None and (caching := Caching.of(args.cache, args.cache_form, args.region)) is not None:
        caching.check_calls(args.steps)  # before an engine is built that could not run
    out = folder / adapter.name
    with console.progress(f"building {out} for {chosen}") as tell:
        engine = build(
            adapter,
            target=chosen,
            out=out,
            overwrite=True,
            expect={**adapter.expected, **args.expect},
            cache=args.cache,
            cache_form=args.cache_form,
            region=args.region,
            sampling=None if args.solver is None else sampling_of(adapter, args.solver, args.steps, args.guidance),
            progress=tell,
        )
    if args.cache is not None:
        calls = args.steps if args.solver is None else len(table_of(adapter, args.solver, args.steps))
        console.show(expected(args.cache, engine.manifest, calls))
    if args.solver is not None:
        return LoopDenoise(engine, adapter), dict(engine.report)
    if args.cache is not None:
        return CachedDenoise(engine, args.steps), dict(engine.report)
    names = [t.name for t in engine.inputs]

    def denoise(*tensors: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = next(iter(engine(**dict(zip(names, tensors, strict=True))).values()))
        return made

    return denoise, dict(engine.report)


def _other(name: str, adapter: Adapter, module: Any, console: Console) -> Denoise:
    """The model as another compiler makes it faster, without this one."""
    with console.progress(f"compiling with {name}"):
        if name == "inductor":
            return _compiled(adapter, "inductor")
        return _plain_onnxruntime(adapter, module)


def _compiled(adapter: Adapter, backend: str) -> Denoise:
    import torch

    compiled: Callable[..., Any] = torch.compile(adapter.module(), backend=backend)
    with torch.no_grad():
        compiled(*adapter.example_inputs().values())
    return compiled


def _plain_onnxruntime(adapter: Adapter, module: Any) -> Denoise:
    """Export as torch does it, ONNX Runtime's own optimisations."""
    import torch

    from hasten.passes.fx.to_onnx import onnx_from_graph
    from hasten.tools.runner import onnx_runner

    inputs = adapter.example_inputs()
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, strict=False)
    runner = onnx_runner(onnx_from_graph(_positional(program), tuple(inputs.values()), None), "the plain export")
    names = [t.name for t in runner.inputs]

    def denoise(*tensors: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = next(iter(runner.call(dict(zip(names, tensors, strict=True))).values()))
        return made

    return denoise


def _positional(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    from hasten.backends.program import flatten

    return flatten(program.module(check_guards=False), program).module


def _generate(
    contenders: Sequence[Contender], adapter: Adapter, labels: Sequence[int], args: argparse.Namespace, console: Console
) -> None:
    from hasten.models.scenes import noisy_classifier
    from hasten.models.scenes.generate import generate

    with console.progress("generating") as tell:
        for i, contender in enumerate(contenders):
            tell(contender.label, i / len(contenders))
            if isinstance(contender.denoise, CachedDenoise):
                contender.denoise.begin()
            if isinstance(contender.denoise, LoopDenoise):
                contender.pictures = contender.denoise.generate(labels, seed=args.seed)
            else:
                table = None if args.solver is None else table_of(adapter, args.solver, args.steps)
                guide = noisy_classifier.guide(len(labels))[0] if is_guided(adapter, args.solver, args.steps) else None
                contender.pictures = generate(
                    contender.denoise,
                    adapter,
                    labels,
                    steps=args.steps,
                    guidance=args.guidance,
                    seed=args.seed,
                    table=table,
                    guide=guide,
                )
            check_finite(contender.label, contender.pictures)


def check_finite(name: str, pictures: torch.Tensor) -> None:
    """`HastenError` where what ``name`` made is no picture."""
    if not bool(pictures.isfinite().all()):
        raise HastenError(f"{name} made pictures with NaN or infinity")


def write(
    contenders: Sequence[Contender], columns: Sequence[str], document: dict[str, Any], folder: Path, console: Console
) -> None:
    """Write the pictures and ``document``, which gets their paths before those of its own ``outputs``."""
    import json

    results = folder / f"{document['model']}.json"
    shown = _write_pictures(contenders, columns, folder / document["model"])
    document["outputs"] = [*(str(path) for path in (*shown, results)), *document.get("outputs", ())]
    replace_text(results, json.dumps(document, indent=2, allow_nan=False) + "\n")
    console.document(document)


def _write_pictures(contenders: Sequence[Contender], columns: Sequence[str], stem: Path) -> list[Path]:
    """Write a row for each contender: pictures as PNG; clips as film strips that run downwards, and as GIF."""
    import torch

    picture, film = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".gif")
    rows = {c.label: c.pictures for c in contenders}
    if next(iter(rows.values())).ndim == 4:
        write_rows(rows, columns, picture)
        return [picture]
    from hasten.models.scenes.generate import write_gif

    write_rows({label: clips.transpose(1, 2).flatten(2, 3) for label, clips in rows.items()}, columns, picture)
    both = torch.cat(list(rows.values()))
    replace(film, lambda partial: write_gif(both, partial, columns=len(columns)))
    return [picture, film]


def _time(contenders: Sequence[Contender], adapter: Adapter, repeat: int, console: Console) -> None:
    """One call of the network, which is what a step costs, by turns; all are warm from the pictures."""
    import torch

    inputs = tuple(adapter.example_inputs().values())
    calls = [_call(c.denoise, inputs, repeat) for c in contenders]
    with torch.no_grad(), console.progress("timing"):
        for contender, times in zip(contenders, take_turns(calls, repeat), strict=True):
            contender.times = times


def _cache(denoise: Denoise, adapter: Adapter, labels: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """What the step cache did and what it gained; empty without one."""
    if isinstance(denoise, LoopDenoise):
        return denoise.report(labels, args.seed, args.repeat) if args.cache is not None else {}
    if not isinstance(denoise, CachedDenoise):
        return {}
    import torch

    from hasten.models.scenes.generate import generate

    def run() -> object:
        return generate(denoise, adapter, labels, steps=args.steps, guidance=args.guidance, seed=args.seed)

    with torch.no_grad():
        return denoise.report(run, tuple(adapter.example_inputs().values()), args.repeat)


def _call(denoise: Denoise, inputs: Sequence[torch.Tensor], repeat: int) -> Callable[[], object]:
    """One step; a computed one where there is a step cache, whose reused steps are timed apart."""
    if isinstance(denoise, LoopDenoise):
        return denoise.one_row()
    if not isinstance(denoise, CachedDenoise):
        return lambda: denoise(*inputs)
    run = denoise.engine.start(8 * repeat, mask="1" * (8 * repeat))
    given = dict(zip(denoise.names, inputs, strict=True))
    return lambda: run(force=1, **given)


def _document(
    contenders: Sequence[Contender],
    args: argparse.Namespace,
    labels: Sequence[int],
    chosen: str,
    report: Mapping[str, Any],
    cache: Mapping[str, Any],
    build_seconds: float,
) -> dict[str, Any]:
    baseline = contenders[0]
    rows = []
    for contender in contenders:
        # of neighbours in time, so that what else the machine does meanwhile is in both
        pairs = zip(baseline.times.seconds, contender.times.seconds, strict=True)
        ratios = Times(tuple(a / b for a, b in pairs))
        rows.append(
            {
                "name": contender.label,
                "seconds_per_step": contender.times.as_dict(),
                "speedup": ratios.as_dict(),
                "psnr_db": psnr(baseline.pictures, contender.pictures),
                "max_abs_difference": (contender.pictures - baseline.pictures).abs().max().item(),
            }
        )
    return {
        "model": args.model,
        "target": chosen,
        "steps": args.steps,
        "solver": args.solver,
        "guidance": args.guidance,
        "seed": args.seed,
        "labels": list(labels),
        "skipped_steps": cache.get("skipped_steps", 0),
        "cache": cache,
        "build_seconds": build_seconds,
        "results": rows,
        "rules": report.get("rules", []),
    }


def _show(contenders: Sequence[Contender], document: Mapping[str, Any], console: Console) -> None:
    shown = table("", ">time per step", ">faster than the baseline", ">p20 to p80", ">PSNR to the baseline")
    for i, row in enumerate(document["results"]):
        speedup = row["speedup"]
        quality = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        cells = (f"{speedup['median']:.2f}x", f"{speedup['p20']:.2f}x to {speedup['p80']:.2f}x", quality)
        shown.add_row(row["name"], duration(row["seconds_per_step"]["median"]), *(cells if i else ("", "", "")))
    count = len(document["labels"])
    solver = document["solver"] or ("DDIM" if document["model"] == "scenes-unet" else "flow Euler")
    made = "clips" if contenders[0].pictures.ndim == 5 else "pictures"
    console.show(
        f"{document['model']}: {count} {made}, {document['steps']} {solver} steps, "
        f"guidance {document['guidance']:g}; {len(contenders[0].times.seconds)} timed steps of each, taking turns",
        "",
        shown,
        *(summary(document["cache"]) if document["cache"] else ()),
        "",
        f"wrote {', '.join(document['outputs'])}",
    )
