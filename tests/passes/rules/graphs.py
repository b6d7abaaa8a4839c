"""One function, every kind of graph that a rule must serve: captured, rewritten by the same pipeline, and run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from hasten.passes import catalog, pipeline
from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.site_check import SiteCheck
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.rule import Report

FX_LEVELS = ("export", "dynamo", "decomposed")
ONNX_LEVELS = ("onnx-18", "onnx-21", "onnx-23", "torchscript", "torchscript-dynamic")
LEVELS = (*FX_LEVELS, *ONNX_LEVELS)


class Module(torch.nn.Module):
    """A function of tensors, with the tensors it holds as parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, *args):
        return self.function(*args, **dict(self.named_parameters()))


@dataclass
class Rewritten:
    """The rewritten graph: its report, its operators, and how to run it."""

    report: Report
    ops: dict[str, int]
    again: Report
    run: Callable[..., torch.Tensor]


def rewritten(
    level: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...], passes: str | None = None
) -> Rewritten:
    module = module.eval().requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return _fx(level, module, args, passes) if level in FX_LEVELS else _onnx(level, module, args, passes)


def _fx(level: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...], passes: str | None) -> Rewritten:
    if level == "dynamo":
        kept: list[Rewritten] = []

        def backend(graph, _):
            kept.append(_rewrite_fx(graph, passes))
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        compiled(*args)
        return Rewritten(kept[0].report, kept[0].ops, kept[0].again, compiled)
    program = torch.export.export(module, args)
    if level == "decomposed":
        program = program.run_decompositions()
    return _rewrite_fx(program.module(check_guards=False), passes)


def _rewrite_fx(graph: torch.fx.GraphModule, passes: str | None) -> Rewritten:
    steps = pipeline.parse(passes or ",".join(catalog.default("fx")))
    report = pipeline.run(FxGraph(graph), steps, pipeline.Context(verify=SiteCheck()), Report())
    again = pipeline.run(FxGraph(graph), steps, pipeline.Context(), Report())
    return Rewritten(report, report.ops_after, again, graph)


def exported(level: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    if level.startswith("onnx-"):
        program = torch.onnx.export(module, args, dynamo=True, opset_version=int(level[5:]), verbose=False)
        return program.model_proto
    names = [f"x{i}" for i in range(len(args))]
    axes = {n: {0: "batch"} for n, a in zip(names, args, strict=True) if a.dim() > 1 and a.shape[0] > 1}
    buffer = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            module,
            args,
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=names,
            dynamic_axes=axes if level.endswith("dynamic") else None,
        )
    return onnx.load_from_string(buffer.getvalue())


def _onnx(level: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...], passes: str | None) -> Rewritten:
    import onnxruntime

    from hasten.passes.onnx.site_check import SiteCheck as OnnxSiteCheck

    graph = OnnxGraph(exported(level, module, args))
    steps = pipeline.parse(f"canonical,{passes}" if passes else ",".join(catalog.default("onnx")[:-1]))
    report = pipeline.run(graph, steps, pipeline.Context(verify=OnnxSiteCheck()), Report())
    model = graph.to_model()
    again = pipeline.run(OnnxGraph(model), steps, pipeline.Context(), Report())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        feed = {i.name: np.asarray(t) for i, t in zip(session.get_inputs(), tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return Rewritten(report, report.ops_after, again, run)


def assert_equal(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the norm of the float64 reference."""
    got = got[0] if isinstance(got, tuple) else got
    assert got.shape == want.shape
    assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


def in_float64(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The reference: the untouched module in float64."""
    import copy

    doubled = copy.deepcopy(module).double()
    return doubled(*(a.double() if a.is_floating_point() else a for a in args))
