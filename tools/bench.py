"""``hasten bench``: models and layers, each in several implementations, side by side in one run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, UsageError, VerificationError
from hasten.tools import bench_lines, bench_plot
from hasten.tools.arguments import DTYPES, number, one_of, source_options, target, whole
from hasten.tools.bench_implementations import IMPLEMENTATIONS, Implementation, check_baseline, chosen, parse_names
from hasten.tools.bench_machine import conditions, gpu, load, pinned, processor, versions
from hasten.tools.bench_process import MALLOC
from hasten.tools.bench_row import FAILED, WRONG
from hasten.tools.bench_show import heading, title, work_parts
from hasten.tools.bench_works import SETS, Work, works
from hasten.tools.console import Console
from hasten.tools.files import check_output

SUMMARY = (
    "Time models and layers in several implementations, interleaved in one run, each in a process of its own; exit "
    "code 5 if one computes something else."
)
EXAMPLES = (
    "hasten bench sd15-vae-decoder@latent:1x4x32x32 --implementations eager,inductor,hasten-aoti --plot vae.png",
    "hasten bench scenes-dit --cache first-block:threshold=0.1 --cache teacache:threshold=0.1,coefficients=1/0 "
    "--thresholds 0.05,0.1,0.2 --rounds 3 --plot caches.png",
    "hasten bench scenes-unet --solver ddim,unipc,dpm++2m-karras --steps 5,10,20 --rounds 5 --plot solvers.png",
)
RTOL = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
BUSY = 0.5
"""Load for each thread from which the machine is said to be busy."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        help="model name, with sizes as in sd15-vae-decoder@latent:1x4x32x32, or a layer: conv:320-320@64x64,batch=2, "
        "upsample-conv:512-512@64x64, group-norm-silu:128@256x256,groups=32, geglu:320-1280@4096",
    )
    parser.add_argument("--set", type=_sets, default=(), metavar="NAME,…", help="rows: layers, models, large")
    parser.add_argument(
        "--implementations",
        type=_names,
        metavar="NAME,…",
        help=f"instead of all that run on this CPU: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--baseline", metavar="NAME", help="of ratios (default: the fastest that is not ours)")
    parser.add_argument("--shapes", metavar="NAME:1x4x64x64,…", help="sizes of the named models' inputs")
    parser.add_argument("--dtype", type=one_of(DTYPES), default="float32", help="of weights and inputs (float32)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of inputs and layers' weights (default 0)")
    parser.add_argument("--rtol", type=number, help="largest relative error that is right (default 1e-3 in float32)")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--threads", type=whole(1), metavar="N", help="of each (default: one a processor)")
    timing.add_argument("--rounds", type=whole(1), default=21, metavar="N", help="timed samples of each (default 21)")
    timing.add_argument("--warmup", type=whole(1), default=3, metavar="N", help="calls before the rounds (default 3)")
    timing.add_argument(
        "--max-seconds", type=number, default=300.0, metavar="S", help="end a work's rounds, after 3 (default 300)"
    )
    timing.add_argument(
        "--timeout", type=number, default=1800.0, metavar="S", help="give an implementation up (default 1800)"
    )
    timing.add_argument(
        "--malloc", type=one_of(tuple(MALLOC)), default="keep", help="keep freed pages (default), or the system's way"
    )
    sweeps = parser.add_argument_group("solvers and step caches", "speed against quality, on a bundled model")
    sweeps.add_argument(
        "--solver",
        action="append",
        metavar="NAME,…",
        help="as for hasten build: whole samplers, every one at every --steps",
    )
    sweeps.add_argument("--cache", action="append", metavar="POLICY", help="as for hasten build; may be given again")
    sweeps.add_argument("--thresholds", type=_numbers, metavar="X,…", help="instead of the policy's own")
    sweeps.add_argument("--steps", type=_steps, metavar="N,…", help="of a run (default 50; with --solver 10,20,50)")
    sweeps.add_argument("--count", type=whole(1), default=16, metavar="N", help="pictures of a run (default 16)")
    sweeps.add_argument(
        "--fine", type=whole(1), default=125, metavar="N", help="steps of the solution that PSNR is to (default 125)"
    )
    sweeps.add_argument("--cache-target", type=target, default="aoti:cpu", help="aoti:cpu (default), onnxruntime:cpu")
    output = parser.add_argument_group("results")
    output.add_argument("--jsonl", type=Path, metavar="FILE", help="append one line for each row of the tables")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the times (.png, .svg, .pdf; needs matplotlib)")
    output.add_argument("--render", type=Path, metavar="FILE", help="time nothing: make tables of these JSON lines")
    output.add_argument("--into", type=Path, metavar="FILE.md", help="with --render: between the marks of this file")
    source_options(parser)


def _sets(text: str) -> tuple[str, ...]:
    return tuple(one_of(tuple(SETS))(word) for word in text.split(","))


def _steps(text: str) -> list[int]:
    return list(dict.fromkeys(whole(1)(word) for word in text.split(",")))


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as in 0.05,0.1") from None


def _names(text: str) -> tuple[str, ...]:
    try:
        return parse_names(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace, console: Console) -> int:
    """Time, show, write; or make tables of what was timed before."""
    for path, suffixes in ((args.plot, bench_plot.SUFFIXES), (args.jsonl, ())):
        if path is not None:
            check_output(path, *suffixes)
    if args.plot is not None:
        bench_plot.require()
    if args.render is not None:
        return _render(args, console)
    if args.solver is not None:
        from hasten.tools import bench_solver

        return bench_solver.run(args, console)
    if args.cache is not None:
        from hasten.tools import bench_cache

        return bench_cache.run(args, console)
    if args.into is not None:
        raise UsageError("--into is for --render, which makes the tables of a file of JSON lines")
    threads, cpus = pinned(args.threads)
    asked = works(args.sources, args.set, reduced=args.reduced, weights=args.weights, shapes=args.shapes)
    implementations, left_out = chosen(args.implementations)
    check_baseline(args.baseline, implementations)
    common = {
        "threads": threads,
        "cpus": None if cpus is None else list(cpus),
        "dtype": args.dtype,
        "malloc": args.malloc,
        "seed": args.seed,
        "versions": versions(),
    }
    device = gpu() if all(made.device == "cuda" for made in implementations) else processor()
    console.show(heading(common, device), *(f"left out: {name} ({reason})" for name, reason in left_out.items()))
    _warn_of_load(threads, console)
    lines: list[bench_lines.Line] = []
    for work in asked:
        made = _measure(work, implementations, common, args, console)
        lines += made
        if args.jsonl is not None:
            bench_lines.append(args.jsonl, made)
        console.show(*work_parts(made))
    console.document({**common, "device": device, "left_out": left_out, "rows": lines})
    if args.plot is not None:
        bench_plot.write(lines, args.plot, title(lines))
        console.show("", f"wrote {args.plot}")
    return _verdict(lines)


def _measure(
    work: Work,
    implementations: Sequence[Implementation],
    common: dict[str, Any],
    args: argparse.Namespace,
    console: Console,
) -> list[dict[str, Any]]:
    from hasten.tools.bench_contender import Settings
    from hasten.tools.bench_measure import measure

    settings = Settings(
        threads=common["threads"],
        cpus=common["cpus"],
        rounds=args.rounds,
        warmup=args.warmup,
        max_seconds=args.max_seconds,
        timeout=args.timeout,
        rtol=RTOL[args.dtype] if args.rtol is None else args.rtol,
        seed=args.seed,
        dtype=args.dtype,
        malloc=args.malloc,
        baseline=args.baseline,
    )
    here = conditions()
    with console.progress(work.word) as tell:
        rows = measure(work, implementations, settings, tell)
    devices = {kind: gpu() if kind == "cuda" else processor() for kind in {r.implementation.device for r in rows}}
    return [{**row.as_dict(), **common, "device": devices[row.implementation.device], **here} for row in rows]


def _warn_of_load(threads: int, console: Console) -> None:
    """Others on the processors are in every figure, and most in those whose threads spin while they wait."""
    busy = load()
    if busy is not None and busy > max(BUSY * threads, BUSY):
        advice = ", or set OMP_WAIT_POLICY=passive, so that threads which wait do not spin"
        known = "OMP_WAIT_POLICY" in os.environ
        console.note(
            f"the load average is {busy:.1f}: other processes take part in what is timed; wait for them"
            f"{'' if known else advice}"
        )


def _verdict(lines: Sequence[dict[str, Any]]) -> int:
    for line in lines:
        if line["status"] == WRONG:
            raise VerificationError(f"{line['implementation']} of {line['work']} is wrong: {line['reason']}")
    failed = [f"{line['implementation']} of {line['work']}" for line in lines if line["status"] == FAILED]
    if failed:
        raise HastenError(f"{len(failed)} of {len(lines)} gave no times: {', '.join(failed)}")
    return 0


def _render(args: argparse.Namespace, console: Console) -> int:
    if args.sources or args.set:
        raise UsageError("--render makes tables of what was timed before, and takes no source and no --set")
    lines = bench_lines.latest(bench_lines.read(args.render))
    if not lines:
        raise UsageError(f"{args.render} has no lines; `hasten bench SOURCE --jsonl {args.render}` writes some")
    text = bench_lines.markdown(lines)
    if args.into is not None:
        bench_lines.write_markdown(text, args.into)
    if args.plot is not None:
        bench_plot.write(lines, args.plot, title(lines))
    written = [str(path) for path in (args.into, args.plot) if path is not None]
    console.document({"rows": len(lines), "markdown": text, "written": written})
    if written:
        console.show(f"wrote {', '.join(written)}")
    elif not args.json:
        print(text)  # as it is: a line of a table must not be folded
    return 0
