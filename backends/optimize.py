"""`optimize` and `optimize_onnx`: capture, run the pipeline, verify, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.backends.choosing import Choosing
from hasten.backends.collection import collection_off
from hasten.backends.target import Target, parse_target, supports
from hasten.errors import UsageError, VerificationError
from hasten.passes import catalog, pipeline
from hasten.passes.choice import Chooser, Limits, fastest_predicted
from hasten.passes.rule import Fuel, Report

if TYPE_CHECKING:
    import onnx
    import torch

VERIFY = ("structure", "sites", "model")
"""``structure``: the graph is well formed after every pass. ``sites``: and every rewrite equals what it replaces on
random inputs. ``model``: and the whole result equals the original on the example inputs and on a second set."""


@collection_off()
def optimize(
    module: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Target = "inductor:cpu",
    passes: str | None = None,
    expect: Mapping[str, int] | None = None,
    fuel: int | None = None,
    skip: Iterable[str] = (),
    dynamic_shapes: Any = None,
    strict: bool = False,
    verify: str = "sites",
    dump: str | Path | None = None,
    choosing: Choosing | None = None,
    source: str = "",
) -> tuple[torch.fx.GraphModule, Report]:
    """Capture ``module`` and rewrite its graph with exact rules.

    Returns the rewritten graph module, which is called like the original, and the `Report`. ``expect`` maps a rule,
    or ``rule.variant``, to the number of sites it must have (`ExpectationError` otherwise); ``fuel`` stops after that
    many rewrites; ``skip`` names passes to leave out. A site whose verification fails is left as it was and named in
    ``report.reverted``; with ``strict`` it raises `VerificationError` instead. ``choosing`` is how implementations
    are chosen; with its ``max_error`` the result is compared with the model in float64, and convolutions give way to
    less rounding ones until the error is within it.
    """
    from hasten.backends.capture import capture
    from hasten.passes.fx.graph import FxGraph
    from hasten.passes.fx.site_check import SiteCheck

    parsed = _target(target)
    _check_verify(verify)
    started = time.perf_counter()
    program = capture(module, tuple(example_inputs), dict(example_kwargs or {}), dynamic_shapes)
    seconds = time.perf_counter() - started
    choosing = choosing or Choosing()

    def rewrite(limits: Limits) -> tuple[torch.fx.GraphModule, Report]:
        rewritten = program.module(check_guards=False)
        report = Report(source=source or type(module).__name__, ir="fx", target=str(parsed))
        report.seconds["capture"] = seconds
        check = SiteCheck() if verify != "structure" else None
        run_pipeline(
            FxGraph(rewritten),
            "fx",
            parsed,
            report,
            passes=passes,
            fuel=fuel,
            skip=skip,
            verify=check,
            dump=dump,
            limits=limits,
            chooser=choosing.chooser(),
        )
        if check is not None and check.unchecked:
            report.notes.append(f"{check.unchecked} sites are too large to be compared with what they replace")
        return rewritten, report

    if choosing.max_error is None:
        rewritten, report = rewrite(choosing.limits())
    else:
        from hasten.backends.model_error import within

        rewritten, report = within(program, tuple(example_inputs), dict(example_kwargs or {}), choosing, rewrite)
    _finish(report, expect, strict)
    if verify == "model":
        from hasten.backends.capture import check_equal

        check_equal(program.module(check_guards=False), rewritten, tuple(example_inputs), dict(example_kwargs or {}))
    return rewritten, report


def optimize_onnx(
    source: str | Path | onnx.ModelProto,
    *,
    target: str | Target = "onnxruntime:cpu",
    passes: str | None = None,
    expect: Mapping[str, int] | None = None,
    fuel: int | None = None,
    skip: Iterable[str] = (),
    strict: bool = False,
    verify: str = "sites",
    dump: str | Path | None = None,
    choosing: Choosing | None = None,
    weights: Path | None = None,
) -> tuple[onnx.ModelProto, Report]:
    """Rewrite an ONNX model, given as a path or in memory, for ``target``; see `optimize` for the options.

    Of ``choosing``, the limits bound each layer; the roofline model chooses, since nothing is timed in ONNX Runtime.
    ``weights`` is the folder with the external weights of a model in memory, which stay there.

    Every operator of ours that stays in the result has a function body in standard operators, so the result runs in
    any runtime.
    """
    from hasten.passes.onnx import io
    from hasten.passes.onnx.graph import OnnxGraph
    from hasten.passes.onnx.site_check import SiteCheck

    parsed = _target(target)
    _check_verify(verify)
    read = io.read(source, detached=weights is not None)
    report = Report(source=read.source, ir="onnx", target=str(parsed), notes=list(read.notes))
    graph = OnnxGraph(read.model, weights)
    check = SiteCheck() if verify != "structure" else None
    run_pipeline(
        graph,
        "onnx",
        parsed,
        report,
        passes=passes,
        fuel=fuel,
        skip=skip,
        verify=check,
        dump=dump,
        limits=(choosing or Choosing()).limits(),
    )
    if check is not None and check.unchecked:
        report.notes.append(f"{check.unchecked} sites are too large to be compared with what they replace")
    report.notes.extend(graph.notes)
    _finish(report, expect, strict)
    return graph.to_model(), report


def run_pipeline(
    graph: Any,
    ir: str,
    target: Target,
    report: Report,
    *,
    passes: str | None,
    fuel: int | None,
    skip: Iterable[str],
    verify: Any,
    dump: str | Path | None,
    limits: Limits | None = None,
    chooser: Chooser = fastest_predicted,
) -> None:
    """Run the default passes of ``ir``, or those named, over ``graph``."""
    steps = pipeline.parse(passes) if passes is not None else [(name, {}) for name in catalog.default(ir)]
    if fuel is not None and fuel < 0:
        raise UsageError(f"fuel: {fuel} rewrites were asked for; give a number from 0 up")

    def supported(op: str, dtype: str, *, in_control_flow: bool = False) -> str | None:
        return supports(op, dtype, target, in_control_flow=in_control_flow)

    context = pipeline.Context(
        target=str(target),
        supports=supported,
        fuel=Fuel(fuel),
        verify=verify,
        limits=limits or Limits(),
        chooser=chooser,
    )
    hook = pipeline.dump_to(Path(dump)) if dump is not None else None
    pipeline.run(graph, steps, context, report, skip=skip, hook=hook)


def _target(target: str | Target) -> Target:
    return target if isinstance(target, Target) else parse_target(target)


def _check_verify(verify: str) -> None:
    if verify not in VERIFY:
        raise UsageError(f"verify: {verify!r} is none of {', '.join(VERIFY)}")


def _finish(report: Report, expect: Mapping[str, int] | None, strict: bool) -> None:
    if strict and report.reverted:
        rule, site = report.reverted[0]
        more = f" ({len(report.reverted) - 1} more)" if len(report.reverted) > 1 else ""
        raise VerificationError(
            f"{rule} at {site.where}: {site.reason}{more}; the site was left as it was: "
            f"run without --strict, or with --skip {rule}"
        )
    if expect:
        report.expect(expect)
