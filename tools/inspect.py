"""``hasten inspect``: what is in a graph, what the rules do to it, and what they nearly do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hasten.errors import UsageError
from hasten.passes.rule import MissSite, Report, RuleReport, Site
from hasten.tools import page
from hasten.tools.arguments import (
    DTYPES,
    cache_options,
    choice_options,
    one_of,
    passes,
    rule_options,
    source_options,
    target,
)
from hasten.tools.console import Console
from hasten.tools.report import Findings, choices_table, heading, misses_table, operators_table, rules_table
from hasten.tools.source import ENGINE, MODEL, ONNX, PROGRAM, resolve

SUMMARY = "Show a graph's operators and costs, what the rules match in it, and what they nearly match and why not."
EXAMPLES = (
    "hasten inspect unet.onnx --shapes sample:1x4x64x64 --html unet.html --expect attention=32",
    "hasten inspect scenes-dit --cache first-block:threshold=0.1",
    "hasten inspect sd15-unet --reduced --expect attention=32,group-norm-act.silu=45",
)
OPERATORS = 24
"""Operators that are shown without -v."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source", metavar="SOURCE", help=".onnx or .pt2 file, model name, diffusers directory, or engine"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no network as well")
    parser.add_argument("--target", type=target, help="whose rules: onnxruntime:cpu for ONNX, else inductor:cpu")
    parser.add_argument("--passes", type=passes, metavar="NAME,…", help="these passes instead of the default ones")
    parser.add_argument("--shapes", metavar="NAME:1x4x64x64,…", help="sizes for the symbols of an ONNX file")
    parser.add_argument("--dtype", type=one_of(DTYPES), help="convert a named model first")
    source_options(parser)
    rule_options(parser)
    choice_options(parser)
    cache_options(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the rules as ``optimize`` does, write nothing, and show what was found."""
    if args.html is not None and not args.html.parent.is_dir():
        raise UsageError(f"cannot write {args.html}: there is no folder {args.html.parent}; create it first")
    source = resolve(args.source, kinds=(ONNX, PROGRAM, MODEL, ENGINE), reduced=args.reduced, weights=args.weights)
    if args.cache_form is not None:
        raise UsageError("--cache-form is for hasten build; inspect shows the region, which is the same in every form")
    if source.kind == ENGINE:
        if args.cache is not None:
            raise UsageError(f"--cache: '{source.text}' is an engine, and what it caches is in its notes; leave it out")
        found = _engine(source.path)
    else:
        from hasten.tools.rewrite import rewrite

        rewritten = rewrite(source, args, console)
        found = rewritten.findings
        if args.cache is not None:
            found.report.notes.extend(_cached(rewritten.graph, source.kind == ONNX, args))
    if args.html is not None:
        page.write(found, args.html)
        found.report.outputs = [str(args.html)]
    _show(found, console)
    console.document(found.as_dict())
    found.report.expect(args.expect)
    return 0


def _show(found: Findings, console: Console) -> None:
    report, everything = found.report, console.verbosity > 0
    console.show(heading(found), "", rules_table(report, found.expected))
    if (missed := misses_table(report, everything=everything)) is not None:
        console.show("", missed)
    if (chosen := choices_table(report, everything=everything)) is not None:
        console.show("", chosen)
    console.show("", operators_table(found, limit=None if everything else OPERATORS))
    for note in report.notes:
        console.show(f"note: {note}")
    for written in report.outputs:
        console.show(f"wrote {written}")


def _cached(graph: Any, onnx: bool, args: argparse.Namespace) -> list[str]:
    """What a step cache would leave out of ``graph``, what it would look at, and the size of what it would keep."""
    from hasten.backends.region import find_cut, find_cut_onnx
    from hasten.passes.steps.catalog import parse

    policy = parse(args.cache)
    found = (find_cut_onnx if onnx else find_cut)(graph, policy, args.region)
    return [f"step cache {policy.name}: {line}" for line in found.lines]


def _engine(path: Path) -> Findings:
    """What an engine's manifest says of the build."""
    from hasten.backends.manifest import read_manifest

    manifest = read_manifest(path)
    return Findings(report_from_dict(manifest.report), manifest.inputs, manifest.outputs)


def report_from_dict(content: Any) -> Report:
    """The `Report` that ``as_dict`` wrote."""
    known = {k: v for k, v in content.items() if k in vars(Report())}
    known["rules"] = tuple(
        RuleReport(
            r["name"],
            tuple(Site(**s) for s in r["sites"]),
            tuple(MissSite(m["site"], m["reason"]) for m in r["misses"]),
            tuple(MissSite(m["site"], m["reason"]) for m in r.get("reverted", ())),
        )
        for r in content.get("rules", ())
    )
    return Report(**known)
