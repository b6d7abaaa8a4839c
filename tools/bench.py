"""``hasten bench``: models and layers, each in several implementations, side by side in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, UsageError, VerificationError
from hasten.tools import bench_lines, bench_plot
from hasten.tools.arguments import DTYPES, number, one_of, source_options, whole
from hasten.tools.bench_implementations import IMPLEMENTATIONS, Implementation, chosen, parse_names
from hasten.tools.bench_machine import conditions, gpu, pinned, processor, versions
from hasten.tools.bench_process import MALLOC
from hasten.tools.bench_row import FAILED, WRONG
from hasten.tools.bench_works import SETS, works
from hasten.tools.console import Console, table
from hasten.tools.files import check_output

SUMMARY = (
    "Time models and layers in several implementations, interleaved in one run, each in a process of its own; exit "
    "code 5 if one computes something else."
)
EXAMPLES = (
    "hasten bench conv:320-320@64x64,batch=2 group-norm-silu:512@64x64 --threads 2",
    "hasten bench sd15-vae-decoder@latent:1x4x32x32 --implementations eager,inductor,hasten-aoti --plot vae.png",
    "hasten bench --render out/bench.jsonl --into BENCHMARKS.md",
)
RTOL = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        help="model name, with sizes as in sd15-vae-decoder@latent:1x4x32x32, or a layer: conv:320-320@64x64,batch=2, "
        "upsample-conv:512-512@64x64, group-norm-silu:128@256x256,groups=32, geglu:320-1280@4096",
    )
    parser.add_argument("--set", type=_sets, default=(), metavar="NAME,…", help="layers, models: predefined rows")
    parser.add_argument(
        "--implementations",
        type=_names,
        metavar="NAME,…",
        help=f"instead of all that run on this CPU: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--baseline", metavar="NAME", help="of ratios (default: the fastest of a work that is not ours)")
    parser.add_argument("--shapes", metavar="NAME:1x4x64x64,…", help="sizes of the named models' inputs")
    parser.add_argument("--dtype", type=one_of(DTYPES), default="float32", help="of weights and inputs (float32)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of inputs and layers' weights (default 0)")
    parser.add_argument("--rtol", type=number, help="largest relative error that is right (default 1e-3 in float32)")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--threads", type=whole(1), metavar="N", help="of each implementation (default: all processors)")
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
    output = parser.add_argument_group("results")
    output.add_argument("--jsonl", type=Path, metavar="FILE", help="append one line for each work and implementation")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the times (.png, .svg, .pdf; needs matplotlib)")
    output.add_argument("--render", type=Path, metavar="FILE", help="time nothing: make tables of these JSON lines")
    output.add_argument("--into", type=Path, metavar="FILE.md", help="with --render: between the marks of this file")
    source_options(parser)


def _sets(text: str) -> tuple[str, ...]:
    return tuple(one_of(tuple(SETS))(word) for word in text.split(","))


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
    if args.into is not None:
        raise UsageError("--into is for --render, which makes the tables of a file of JSON lines")
    threads, cpus = pinned(args.threads)
    asked = works(args.sources, args.set, reduced=args.reduced, weights=args.weights, shapes=args.shapes)
    implementations, left_out = chosen(args.implementations)
    _check_baseline(args.baseline, implementations)
    common = {
        "threads": threads,
        "cpus": None if cpus is None else list(cpus),
        "dtype": args.dtype,
        "malloc": args.malloc,
        "seed": args.seed,
        "versions": versions(),
    }
    console.show(_heading(common, implementations))
    lines: list[dict[str, Any]] = []
    for work in asked:
        made = _measure(work, implementations, common, args, console)
        if args.jsonl is not None:
            bench_lines.append(args.jsonl, made)
        lines += made
    _finish(lines, left_out, common, args, console)
    return _verdict(lines)


def _measure(
    work: Any, implementations: Sequence[Implementation], common: dict[str, Any], args: Any, console: Console
) -> list[dict[str, Any]]:
    from hasten.tools.bench_measure import Settings, measure

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
    devices = {"cpu": processor(), "cuda": gpu()} if any(r.implementation.device == "cuda" for r in rows) else {}
    name = processor()
    return [{**row.as_dict(), **common, "device": devices.get(row.implementation.device, name), **here} for row in rows]


def _check_baseline(name: str | None, implementations: Sequence[Implementation]) -> None:
    listed = [made.name for made in implementations]
    if name is not None and name not in listed:
        from hasten.errors import nearest

        raise UsageError(f"--baseline {name!r} is none of {', '.join(listed)}.{nearest(name, listed)}")


def _heading(common: dict[str, Any], implementations: Sequence[Implementation]) -> str:
    cpus, threads = common["cpus"], common["threads"]
    where = "not pinned" if cpus is None else f"on processor{'s' if len(cpus) > 1 else ''} {', '.join(map(str, cpus))}"
    device = processor() if any(made.device == "cpu" for made in implementations) else gpu()
    packages = ", ".join(f"{name} {number}" for name, number in common["versions"].items())
    words = f"{threads} thread{'s' if threads != 1 else ''} {where}, {common['dtype']}"
    return f"{device}, {words}, {bench_lines.malloc_words(common['malloc'])}; {packages}\n"


def _finish(lines: list[Any], left_out: dict[str, str], common: dict[str, Any], args: Any, console: Console) -> None:
    console.document({**common, "device": processor(), "left_out": left_out, "rows": lines})
    shown = table(
        "work",
        "implementation",
        ">median ms",
        ">p20",
        ">p80",
        ">times as fast",
        ">peak MiB",
        ">with build",
        ">prepared in",
        ">error",
    )
    before = None
    for line in lines:
        shown.add_row("" if line["work"] == before else line["work"], *_cells(line))
        before = line["work"]
    console.show(shown)
    console.show(*(f"{x['implementation']} of {x['work']}: {x['reason']}" for x in lines if x["reason"]))
    console.show(*(f"left out: {name} ({reason})" for name, reason in left_out.items()))
    if args.plot is not None:
        bench_plot.write(lines, args.plot, _title(lines))
        console.show(f"wrote {args.plot}")


def _cells(line: dict[str, Any]) -> list[str]:
    if line["status"] == FAILED:
        return [line["implementation"], "failed"]
    seconds, ratio = line["seconds"], line["times_as_fast"]
    fast = ""
    if ratio is not None and ratio["baseline"] == line["implementation"]:
        fast = "baseline"
    elif ratio is not None:
        fast = f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    memory = [
        "" if line[k] is None else f"{line[k] / 2**20:.0f}" for k in ("peak_bytes", "peak_bytes_with_build")
    ]
    error = "" if line["error"] is None else "reference" if line["reference"] == line["implementation"] else ""
    error = error or ("wrong" if line["error"] is None and line["status"] == WRONG else "")
    if not error and line["error"] is not None:
        error = f"{line['error']:.1e}" + (" wrong" if line["status"] == WRONG else "")
    times = [bench_lines.milliseconds(seconds[k]) for k in ("median", "p20", "p80")]
    return [line["implementation"], *times, fast, *memory, f"{line['prepare_seconds']:.1f} s", error]


def _title(lines: Sequence[dict[str, Any]]) -> str:
    first = lines[0]
    return f"{first['device']}, {first['threads']} threads, {first['dtype']}, {first['date'].partition('T')[0]}"


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
        bench_plot.write(lines, args.plot, _title(lines))
    written = [str(path) for path in (args.into, args.plot) if path is not None]
    console.document({"rows": len(lines), "markdown": text, "written": written})
    console.show(f"wrote {', '.join(written)}" if written else text)
    return 0
