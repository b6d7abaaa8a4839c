"""Read a source, run the rules over it and count what it costs: what ``inspect`` and ``optimize`` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.errors import UsageError
from hasten.tools.arguments import choosing
from hasten.tools.console import Console
from hasten.tools.report import Findings
from hasten.tools.source import MODEL, ONNX, Source, program_inputs

if TYPE_CHECKING:
    import onnx
    import torch


class Rewritten(NamedTuple):
    """The rewritten graph, what it was made from, and what was found."""

    graph: torch.fx.GraphModule | onnx.ModelProto
    original: torch.export.ExportedProgram | onnx.ModelProto
    findings: Findings


def rewrite(source: Source, args: argparse.Namespace, console: Console) -> Rewritten:
    """Run the passes that ``args`` asks for. ``args.expect`` is left to the caller, who shows the findings first."""
    options: dict[str, Any] = {
        "passes": args.passes,
        "fuel": args.fuel,
        "skip": args.skip,
        "strict": args.strict,
        "verify": args.verify,
        "dump": getattr(args, "dump", None),
    }
    default = "onnxruntime:cpu" if source.kind == ONNX else "inductor:cpu"
    options["target"] = args.target or default
    with console.progress(f"reading {source.text}") as tell:
        if source.kind == ONNX:
            return _onnx(source, args.shapes, {**options, "choosing": choosing(args)}, tell)
        if args.shapes is not None:
            raise UsageError(
                f"--shapes is for ONNX files; the sizes of '{source.text}' are those of its example inputs"
            )
        return _torch(source, args.dtype, {**options, "choosing": choosing(args)}, tell)


def _torch(source: Source, dtype: str | None, options: Mapping[str, Any], tell: Any) -> Rewritten:
    from hasten.backends.optimize import optimize
    from hasten.backends.program import flatten
    from hasten.passes.fx.flops import costs, weight_bytes
    from hasten.passes.fx.graph import FxGraph

    tell("capture", 0.0)
    adapter = source.adapter() if source.kind == MODEL else None
    program = source.program(dtype)
    original = program.module(check_guards=False)
    tell("rules", 0.5)
    args, kwargs = program_inputs(program)
    graph, report = optimize(program, args, example_kwargs=kwargs, source=source.text, **options)
    flat = flatten(original, program, output_names=adapter.output_names if adapter is not None else None)
    findings = Findings(
        report,
        flat.inputs,
        flat.outputs,
        costs(FxGraph(original)),
        costs(FxGraph(graph)),
        weight_bytes(original),
        adapter.expected if adapter is not None else {},
    )
    return Rewritten(graph, program, findings)


def _onnx(source: Source, shapes: Any, options: Mapping[str, Any], tell: Any) -> Rewritten:
    from hasten.backends.onnx_signature import fix_shapes, signature
    from hasten.backends.optimize import optimize_onnx
    from hasten.backends.shapes import check_profiles, parse_profiles
    from hasten.passes.onnx import io
    from hasten.passes.onnx.flops import costs, weight_bytes
    from hasten.passes.onnx.graph import OnnxGraph

    tell("read", 0.0)
    model = io.read(source.path).model
    if shapes is not None:
        profiles = parse_profiles(shapes)
        check_profiles(profiles, signature(model).inputs)
        fix_shapes(model, profiles)
    tell("rules", 0.2)
    graph, report = optimize_onnx(model, **options)
    report.source = source.text
    before, after = OnnxGraph(model), OnnxGraph(graph)
    counted = costs(before)
    if counted.symbols:
        report.notes.append(
            f"sizes {', '.join(counted.symbols)} are symbolic and were counted as 1; --shapes gives them values"
        )
    if counted.unknown:
        report.notes.append(f"{counted.unknown} nodes have unknown shapes and were not counted")
    named = signature(model)
    findings = Findings(report, named.inputs, named.outputs, counted.costs, costs(after).costs, weight_bytes(before))
    return Rewritten(graph, model, findings)
