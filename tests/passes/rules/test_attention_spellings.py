"""Every spelling becomes one attention node and keeps its numbers, on each form of FX graph."""

from __future__ import annotations

import pytest
import torch
from spellings import CASES, Case, inputs

from hasten.passes import pipeline
from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.site_check import SiteCheck
from hasten.passes.rule import Report


class Module(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class _Ordered(torch.nn.Module):
    """Dynamo's graph takes its inputs in the order of their first use."""

    def __init__(self, graph: torch.fx.GraphModule, order: list[int]) -> None:
        super().__init__()
        self.graph_module, self.order = graph, order

    def forward(self, *args):
        return self.graph_module(*(args[i] for i in self.order))


def rewrite(module: torch.fx.GraphModule, passes: str = "attention") -> Report:
    module = module.graph_module if isinstance(module, _Ordered) else module
    return pipeline.run(FxGraph(module), pipeline.parse(passes), pipeline.Context(verify=SiteCheck()), Report())


def captured(level: str, case: Case, args: tuple[torch.Tensor, ...]) -> torch.fx.GraphModule:
    module = Module(case.function).eval()
    with torch.no_grad():
        if level == "dynamo":
            kept = []
            torch._dynamo.reset()
            torch.compile(module, backend=lambda gm, _: kept.append(gm) or gm.forward, fullgraph=True)(*args)
            names = [n.name for n in kept[0].graph.find_nodes(op="placeholder")]
            order = [int(name.removeprefix("l_args_").removesuffix("_")) for name in names]
            return _Ordered(kept[0], order)
        program = torch.export.export(module, args)
        if level == "decomposed":
            program = program.run_decompositions()
        return program.module(check_guards=False)


EINSUM_DECOMPOSED = frozenset({"einsum-heads", "einsum-rows-before-heads", "einsum-compvis", "guided-diffusion"})
"""After run_decompositions, einsum is a chain of five-axis reshapes and permutations, which is not read back."""


@pytest.mark.parametrize("level", ["export", "dynamo", "decomposed"])
@pytest.mark.parametrize("name", CASES)
def test_is_recognised_and_equal(name: str, level: str) -> None:
    case = CASES[name]
    args = inputs(case)
    graph = captured(level, case, args)
    report = rewrite(graph)
    assert report["attention"].reverted == ()
    expected = 0 if level == "decomposed" and name in EINSUM_DECOMPOSED else 1
    assert report["attention"].hits == expected, report["attention"].misses
    for seed in (0, 1):
        args = inputs(case, seed=seed)
        got, want = graph(*args), case.function(*(a.double() if a.is_floating_point() else a for a in args))
        got = got[0] if isinstance(got, tuple) else got
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)
    assert rewrite(graph)["attention"].hits == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["scores-multiplied", "upcast-softmax", "upcast-scores", "rows-before-heads", "upcast-bmm"]
)
def test_half_precision_is_no_worse_than_the_spelling(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    args = inputs(case, dtype)
    graph = captured("export", case, args)
    assert rewrite(graph)["attention"].hits == 1
    want = case.function(*(a.double() for a in args))
    spelled = (case.function(*args).double() - want).norm()
    fused = (graph(*args).double() - want).norm()
    assert fused <= 1.05 * spelled + 1e-3 * want.norm()
