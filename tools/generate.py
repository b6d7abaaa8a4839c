"""``hasten generate``: the same pictures from a bundled model, plain and optimised, and the time of each."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError, UsageError, nearest
from hasten.tools.arguments import expectations, number, one_of, target, whole
from hasten.tools.console import Console, duration, table
from hasten.tools.files import check_folder, replace_text
from hasten.tools.grid import write_rows
from hasten.tools.timing import Times, take_turns

if TYPE_CHECKING:
    import torch

    from hasten.models.adapter import Adapter
    from hasten.models.scenes.generate import Denoise

SUMMARY = "Generate the same pictures with a bundled model, plain and optimised, and compare pictures and times."
EXAMPLES = (
    "hasten generate scenes-unet -o out/",
    "hasten generate scenes-dit -o out/ --steps 20 --count 4 --labels 0,5,10,15 --target onnxruntime:cpu",
    "hasten generate scenes-unet -o out/ --against inductor,onnxruntime",
)
BASELINE = "baseline (eager PyTorch)"
AGAINST = ("inductor", "onnxruntime")
NO_COMPILER = (
    "there is no C++ compiler here (apt install g++, or set CXX), so the target is onnxruntime:cpu instead of aoti:cpu"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="scenes-unet (DDIM) or scenes-dit (Euler's method for flows)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="for pictures, JSON and engine")
    parser.add_argument("--target", type=target, help="aoti:cpu, or onnxruntime:cpu where there is no C++ compiler")
    parser.add_argument("--steps", type=whole(1), default=25, help="solver steps (default 25)")
    parser.add_argument("--guidance", type=number, default=2.0, help="classifier-free guidance (default 2; 1: none)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the noise (default 0)")
    parser.add_argument("--count", type=whole(1), default=8, help="pictures (default 8)")
    parser.add_argument("--labels", type=_labels, metavar="N,…", help="classes, 0 to 15, instead of all in turn")
    parser.add_argument(
        "--repeat", type=whole(1), default=20, metavar="N", help="timed steps of each, taking turns (default 20)"
    )
    parser.add_argument(
        "--against", type=_against, default=(), metavar="NAME,…", help="more baselines: inductor, onnxruntime"
    )
    parser.add_argument("--expect", type=expectations, default={}, metavar="RULE=N,…", help="as for hasten build")


def _labels(text: str) -> list[int]:
    from hasten.models.scenes.data import CLASSES

    words = text.split(",")
    if not all(w.isdecimal() and int(w) < len(CLASSES) for w in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of classes from 0 to {len(CLASSES) - 1}, as in 0,5,10"
        )
    return [int(w) for w in words]


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
    from hasten.models.scenes.data import CLASSES

    if args.model not in BUNDLED:
        raise UsageError(
            f"{args.model!r} is no bundled model; there are {', '.join(BUNDLED)}.{nearest(args.model, BUNDLED)}"
        )
    labels = args.labels or [(5 * i) % len(CLASSES) for i in range(args.count)]
    labels = [labels[i % len(labels)] for i in range(args.count)]
    folder = check_folder(args.output)
    chosen = _target(args.target, console)
    network_batch = args.count * (1 if args.guidance == 1 else 2)
    adapter = replace(get(args.model), batch=network_batch)
    module = adapter.module()
    started = time.perf_counter()
    optimised, report = _optimised(adapter, chosen, folder, args.expect, console)
    build_seconds = time.perf_counter() - started
    contenders = [Contender(BASELINE, module), Contender(f"hasten ({chosen})", optimised)]
    contenders += [Contender(name, _other(name, adapter, module, console)) for name in args.against]
    _generate(contenders, adapter, labels, args, console)
    _time(contenders, adapter, args.repeat, console)
    document = _document(contenders, args, labels, chosen, report, build_seconds)
    stem = f"{args.model}"
    pictures, results = folder / f"{stem}.png", folder / f"{stem}.json"
    rows = {c.label: c.pictures for c in contenders[:2]}
    write_rows(rows, [CLASSES[n] for n in labels], pictures)
    document["outputs"] = [str(pictures), str(results), str(folder / stem)]
    import json

    replace_text(results, json.dumps(document, indent=2, allow_nan=False) + "\n")
    console.document(document)
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
    adapter: Adapter, chosen: str, folder: Path, expect: Mapping[str, int], console: Console
) -> tuple[Denoise, dict[str, Any]]:
    """The optimised network, and its report."""
    if chosen == "inductor:cpu":
        return _compiled(adapter, "hasten"), {}
    from hasten.backends.build import build

    out = folder / adapter.name
    with console.progress(f"building {out} for {chosen}") as tell:
        engine = build(
            adapter, target=chosen, out=out, overwrite=True, expect={**adapter.expected, **expect}, progress=tell
        )
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
    from hasten.models.scenes.generate import generate

    with console.progress("generating") as tell:
        for i, contender in enumerate(contenders):
            tell(contender.label, i / len(contenders))
            contender.pictures = generate(
                contender.denoise, adapter, labels, steps=args.steps, guidance=args.guidance, seed=args.seed
            )
            if not bool(contender.pictures.isfinite().all()):
                raise HastenError(f"{contender.label} made pictures with NaN or infinity")


def _time(contenders: Sequence[Contender], adapter: Adapter, repeat: int, console: Console) -> None:
    """One call of the network, which is what a step costs, by turns; all are warm from the pictures."""
    import torch

    inputs = tuple(adapter.example_inputs().values())
    calls = [lambda denoise=c.denoise: denoise(*inputs) for c in contenders]
    with torch.no_grad(), console.progress("timing"):
        for contender, times in zip(contenders, take_turns(calls, repeat), strict=True):
            contender.times = times


def psnr(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]; None where they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(4 / error) if error else None


def _document(
    contenders: Sequence[Contender],
    args: argparse.Namespace,
    labels: Sequence[int],
    chosen: str,
    report: Mapping[str, Any],
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
        "guidance": args.guidance,
        "seed": args.seed,
        "labels": list(labels),
        "skipped_steps": 0,
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
    solver = "DDIM" if document["model"] == "scenes-unet" else "flow Euler"
    console.show(
        f"{document['model']}: {count} pictures, {document['steps']} {solver} steps, "
        f"guidance {document['guidance']:g}; {len(contenders[0].times.seconds)} timed steps of each, taking turns",
        "",
        shown,
        "",
        f"wrote {', '.join(document['outputs'])}",
    )
