"""``hasten build``: a source in, an engine directory out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.tools.arguments import (
    DTYPES,
    cache_options,
    choice_options,
    choosing,
    number,
    one_of,
    rule_options,
    sampler_options,
    sampling,
    source_options,
    target,
)
from hasten.tools.console import Console, duration, quantity
from hasten.tools.report import Findings, choices_table, heading, misses_table, rules_table
from hasten.tools.source import MODEL, ONNX, PROGRAM, Source, load_program, resolve

if TYPE_CHECKING:
    from hasten.backends.shapes import Shapes

SUMMARY = (
    "Build an engine directory: the compiled artifact, and a manifest with what was done and the hash of every file."
)
EXAMPLES = (
    "hasten build scenes-unet --target onnxruntime:cpu --solver unipc --steps 20 --guidance 3 -o engines/sampler",
    "hasten build scenes-dit --target aoti:cpu --cache first-block:threshold=0.2 -o engines/scenes-dit-cached",
    "hasten build sd15-unet --reduced --target tensorrt-rtx:sm89,sm120 --dtype float16 -o engines/sd15",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SOURCE", help=".onnx or .pt2 file, model name, or diffusers directory")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the engine directory to write")
    parser.add_argument("--target", type=target, help="aoti:cpu unless the source is ONNX, then onnxruntime:cpu")
    parser.add_argument("--dtype", type=one_of(DTYPES), help="convert a named model first")
    parser.add_argument("--force", action="store_true", help="replace an engine that is there already")
    parser.add_argument("--timeout", type=number, metavar="SECONDS", help="of a TensorRT build")
    group = parser.add_argument_group("sizes", "NAME:1x4x64x64,… as trtexec, or NAME:[1,4,64,64],… as polygraphy")
    group.add_argument("--shapes", metavar="SHAPES", help="fixed sizes")
    for kind in ("min", "opt", "max"):
        group.add_argument(f"--{kind}-shapes", metavar="SHAPES", help=f"{kind} of a range; all three together")
    source_options(parser)
    rule_options(parser, verify=False)
    choice_options(parser)
    cache_options(parser)
    sampler_options(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Build, and show the manifest's report."""
    from hasten.backends.build import build
    from hasten.tools.inspect import report_from_dict

    source = resolve(args.source, reduced=args.reduced, weights=args.weights)
    chosen = args.target or ("onnxruntime:cpu" if source.kind == ONNX else "aoti:cpu")
    given, options = _given(source, _shapes(args))
    with console.progress(f"building {args.output}") as tell:
        engine = build(
            given,
            target=chosen,
            out=args.output,
            dtype=args.dtype,
            expect=args.expect,
            fuel=args.fuel,
            skip=args.skip,
            strict=args.strict,
            timeout=args.timeout,
            choosing=choosing(args),
            cache=args.cache,
            cache_form=args.cache_form,
            region=args.region,
            sampling=sampling(args),
            overwrite=args.force,
            progress=tell,
            **options,
        )
    report = report_from_dict(engine.report)
    report.source, report.outputs = source.text, [str(args.output)]
    found = Findings(report, engine.inputs, engine.outputs)
    size = sum(p.stat().st_size for p in engine.path.iterdir())
    console.document({**found.as_dict(), "engine": {"seconds": engine.manifest.seconds, "bytes": size}})
    console.show(heading(found), "", rules_table(report))
    if (missed := misses_table(report, everything=console.verbosity > 0)) is not None:
        console.show("", missed)
    if (chosen := choices_table(report, everything=console.verbosity > 0)) is not None:
        console.show("", chosen)
    for note in report.notes:
        console.show(f"note: {note}")
    console.show(f"wrote {args.output}: {quantity(size, 'B')} in {duration(engine.manifest.seconds)}")
    return 0


def _shapes(args: argparse.Namespace) -> Shapes | tuple[Shapes, Shapes, Shapes] | None:
    three = (args.min_shapes, args.opt_shapes, args.max_shapes)
    if args.shapes is not None:
        if any(s is not None for s in three):
            raise UsageError("--shapes fixes the sizes; leave out --min-shapes, --opt-shapes and --max-shapes, or it")
        return str(args.shapes)
    if all(s is None for s in three):
        return None
    for kind, shapes in zip(("min", "opt", "max"), three, strict=True):
        if shapes is None:
            raise UsageError(f"--{kind}-shapes is missing; a range needs --min-shapes, --opt-shapes and --max-shapes")
    return three


def _given(source: Source, shapes: Any) -> tuple[Any, dict[str, Any]]:
    """What `hasten.build` is given for a source, and options beside it."""
    if source.kind == ONNX:
        return source.text, {"shapes": shapes}
    if source.kind == PROGRAM:
        if shapes is not None:
            raise UsageError(f"--shapes: the sizes of '{source.text}' are those that it was exported with")
        return load_program(source.path), {}
    assert source.kind == MODEL
    if shapes is None:
        return source.text, {"weights": source.weights}
    from hasten.backends.shapes import parse_profiles
    from hasten.tools.sizes import sized

    adapter, dynamic = sized(source.adapter(), parse_profiles(shapes))
    return adapter, {"dynamic_shapes": dynamic}
