"""Every attention search function of the installed Inductor is matched; its negative cases are left alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._inductor.fx_passes import fuse_attention

from hasten.passes import pipeline
from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.site_check import SiteCheck
from hasten.passes.rule import Report

PATTERNS = {
    name: function
    for name, function in vars(fuse_attention).items()
    if name.startswith("_sfdp_pattern_") and callable(function)
}
HALF_ONLY = {f"_sfdp_pattern_{n}" for n in (7, 8, 9, 10)}
"""These cast the probabilities to float16 whatever the model's type is."""


class Module(torch.nn.Module):
    def __init__(self, function, arguments) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, *tensors):
        given = iter(tensors)
        return self.function(*(next(given) if a is None else a for a in self.arguments))


def arguments(name: str) -> tuple[list[float | None], list[torch.Tensor]]:
    """Numbers for the scalar parameters, None and a tensor for the others. Inference: dropout is off."""
    rng = torch.Generator().manual_seed(0)
    dtype = torch.float16 if name in HALF_ONLY else torch.float32
    rows = 6
    values, tensors = [], []
    for parameter in inspect.signature(PATTERNS[name]).parameters:
        if parameter in ("inv_scale", "inv_scale_factor", "scale_factor"):
            values.append(2.5)
            continue
        if parameter == "dropout_p":
            values.append(0.0)
            continue
        values.append(None)
        if parameter in ("query", "key", "value"):
            shape = (4, rows, 8) if name == "_sfdp_pattern_13" else (2, rows, 4, 8)
            if name in ("_sfdp_pattern_1", "_sfdp_pattern_2", "_sfdp_pattern_19", "_sfdp_pattern_24"):
                shape = (2, 4, rows, 8)
            if name in ("_sfdp_pattern_3", "_sfdp_pattern_4", "_sfdp_pattern_5", "_sfdp_pattern_6", "_sfdp_pattern_28"):
                shape = (2, 4, rows, 8)
            tensors.append(torch.randn(shape, generator=rng).to(dtype))
        elif parameter == "causal_mask":
            tensors.append(torch.ones(1, 1, rows, rows, dtype=torch.bool).tril())
        elif name in ("_sfdp_pattern_15", "_sfdp_pattern_17", "_sfdp_pattern_20"):
            tensors.append(torch.tensor([[3, 1, 0, 2, 1, 0], [1, 0, 0, 7, 1, 1]]))  # any non-zero number attends
        else:
            tensors.append(
                torch.randn((2, 1, 1, rows) if name != "_sfdp_pattern_24" else (2, 1, rows, rows), generator=rng).to(
                    dtype
                )
            )
    return values, tensors


def rewrite(module: torch.nn.Module, tensors: list[torch.Tensor], decomposed: bool = False):
    program = torch.export.export(module.eval(), tuple(tensors))
    if decomposed:
        program = program.run_decompositions()
    graph = program.module(check_guards=False)
    report = pipeline.run(FxGraph(graph), pipeline.parse("attention"), pipeline.Context(verify=SiteCheck()), Report())
    return graph, report["attention"]


def test_there_are_patterns() -> None:
    assert len(PATTERNS) >= 30


@pytest.mark.parametrize("decomposed", [False, True], ids=["export", "decomposed"])
@pytest.mark.parametrize("name", PATTERNS)
def test_search_function_is_matched(name: str, decomposed: bool) -> None:
    values, tensors = arguments(name)
    module = Module(PATTERNS[name], values)
    graph, report = rewrite(module, tensors, decomposed)
    assert report.reverted == ()
    assert report.hits == 1, report.misses
    got, want = graph(*tensors), module(*tensors)
    for g, w in zip(
        got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True
    ):
        assert (g.double() - w.double()).norm() <= (1e-3 if name in HALF_ONLY else 1e-5) * w.double().norm()


def negative(name: str):
    def decorate(function):
        NEGATIVE[name] = function
        return function

    return decorate


NEGATIVE = {}


@negative("the attention probabilities are returned as well")
def _(q, k, v, m):
    p = (q @ k.transpose(-2, -1) / 2.5).softmax(-1)
    return p @ v, p


@negative("the scores are returned as well")
def _(q, k, v, m):
    s = q @ k.transpose(-2, -1) / 2.5
    return s.softmax(-1) @ v, s


@negative("the scale is a tensor")
def _(q, k, v, m):
    return (q @ k.transpose(-2, -1) / m).softmax(-1) @ v


@negative("the mask enlarges the scores")
def _(q, k, v, m):
    return (q[:1] @ k[:1].transpose(-2, -1) + m).softmax(-1) @ v


@negative("the softmax is over the rows")
def _(q, k, v, m):
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


@negative("dropout is active")
def _(q, k, v, m):
    return torch.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5, True) @ v


@negative("masked scores stay small, not minus infinity")
def _(q, k, v, m):
    return (q @ k.transpose(-2, -1)).masked_fill(m > 0, -5.0).softmax(-1) @ v


@negative("a nonlinear function stands between product and softmax")
def _(q, k, v, m):
    return torch.tanh(q @ k.transpose(-2, -1)).softmax(-1) @ v


REASONS = {
    "the attention probabilities are returned as well": "has a user outside the pattern",
    "the scores are returned as well": "has a user outside the pattern",
    "the scale is a tensor": "scales the scores by a tensor that is not a constant",
    "the mask enlarges the scores": "not a product of queries and keys",
    "the softmax is over the rows": "not over the last",
    "dropout is active": None,
    "masked scores stay small, not minus infinity": "only -1e4 and below means no attention",
    "a nonlinear function stands between product and softmax": "which no attention has between product and softmax",
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_leaves_alone_because(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=rng) for _ in range(3))
    mask = torch.randn(2, 4, 6, 6, generator=rng)
    _, report = rewrite(Module(NEGATIVE[name], [None] * 4), [q, k, v, mask])
    assert report.hits == 0
    if REASONS[name] is not None:
        assert any(REASONS[name] in m.reason for m in report.misses), report.misses
