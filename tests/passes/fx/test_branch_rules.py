"""The branch rules of FX graphs: one conditional that keeps to them, and one for each way to break them.

`torch.cond` itself refuses most of these when it is traced; graphs are put together here as a pass does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from hasten.errors import HastenError
from hasten.passes.branch_rule import DEEPEST
from hasten.passes.fx.branch_rules import require, violations

aten = torch.ops.aten
Body = Callable[[fx.Graph, fx.Node], Any]


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node whose fake result is worked out."""
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def negated(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
    return [call(graph, aten.neg.default, x)]


def absolute(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
    return [call(graph, aten.abs.default, x)]


def branch(body: Body, x: torch.Tensor, modules: dict[str, fx.GraphModule] | None = None) -> fx.GraphModule:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    graph.output(tuple(body(graph, node)))
    return fx.GraphModule(modules or {}, graph)


def conditional(true: Body = negated, false: Body = absolute, predicate: torch.Tensor | None = None) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 8)
        branches = {"compute": branch(true, x), "reuse": branch(false, x)}
        graph = fx.Graph()
        nodes = [graph.placeholder("p"), graph.placeholder("x")]
        nodes[0].meta["val"] = torch.empty((), dtype=torch.bool) if predicate is None else predicate
        nodes[1].meta["val"] = x
        parts = [graph.get_attr(name) for name in branches]
        cond = graph.call_function(torch.ops.higher_order.cond, (nodes[0], *parts, (nodes[1],)), name="choose")
        graph.output(cond)
    return fx.GraphModule(branches, graph)


@pytest.mark.parametrize("target", ["aoti:cpu", "inductor:cuda", "onnxruntime:cpu", "tensorrt-rtx:sm89"])
def test_a_conditional_that_keeps_to_the_rules(target: str) -> None:
    assert violations(conditional(), target) == []
    require(conditional(), target)


@pytest.mark.parametrize(
    ("make", "target", "where", "rule", "found"),
    [
        pytest.param(
            conditional,
            "torch-tensorrt",
            "choose",
            "backend",
            "torch_tensorrt has no converter for torch.cond; build tensorrt or tensorrt-rtx, or take the form"
            " 'straight'",
            id="backend",
        ),
        pytest.param(
            lambda: conditional(predicate=torch.empty(1, dtype=torch.bool)),
            "tensorrt-rtx:sm89",
            "choose",
            "predicate",
            "its predicate is bool of shape (1,); squeeze it to 0 dimensions",
            id="predicate-of-one-dimension",
        ),
        pytest.param(
            lambda: conditional(predicate=torch.empty(())),
            "aoti:cpu",
            "choose",
            "predicate",
            "its predicate is float32 of shape (); make it one bool",
            id="predicate",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: negated(g, x) + absolute(g, x)),
            "aoti:cpu",
            "choose",
            "outputs",
            "its branches return 2 and 1 values; return as many in both",
            id="outputs",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [call(g, aten._to_copy.default, x, dtype=torch.float16)]),
            "aoti:cpu",
            "choose",
            "dtype",
            "for output 0 its branches return float16 and float32; convert one of them",
            id="dtype",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [call(g, aten.sum.dim_IntList, x, [0])]),
            "aoti:cpu",
            "choose",
            "rank",
            "for output 0 its branches return 1 and 2 dimensions; reshape one of them",
            id="rank",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [call(g, aten.cat.default, [x, x])]),
            "aoti:cpu",
            "choose",
            "shape",
            "for output 0 its branches return (4, 8) and (2, 8); return one shape",
            id="shape",
        ),
        pytest.param(
            lambda: conditional(
                lambda g, x: [call(g, aten.clone.default, call(g, aten.as_strided.default, x, [2, 8], [1, 2]))]
            ),
            "aoti:cpu",
            "choose",
            "strides",
            "for output 0 its branches return the strides (1, 2) and (8, 1); clone both with torch.contiguous_format",
            id="strides",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [x]),
            "aoti:cpu",
            "choose.true/x",
            "alias",
            "output 0 may be in the memory of x; clone it",
            id="an-operand",
        ),
        pytest.param(
            lambda: conditional(
                false=lambda g, x: [call(g, aten.view.default, call(g, aten.view.default, x, [16]), [2, 8])]
            ),
            "aoti:cpu",
            "choose.false/view_default_1",
            "alias",
            "output 0 may be in the memory of x; clone it",
            id="a-view-of-an-operand",
        ),
        pytest.param(
            lambda: conditional(
                lambda g, x: [n := negated(g, x)[0], call(g, aten.view.default, n, [2, 8])],
                lambda g, x: absolute(g, x) + negated(g, x),
            ),
            "aoti:cpu",
            "choose.true/view_default",
            "alias",
            "outputs 0 and 1 may share their memory; clone one of them",
            id="two-results-in-one-memory",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [call(g, aten.rand_like.default, x)]),
            "aoti:cpu",
            "choose.true/rand_like_default",
            "random",
            "aten.rand_like.default draws random numbers; draw them before the conditional and pass them in",
            id="random",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [call(g, aten.clone.default, call(g, aten.add_.Tensor, x, 1))]),
            "aoti:cpu",
            "choose.true/add__tensor",
            "in-place",
            "aten.add_.Tensor writes in place to memory from outside; use the form that returns a new tensor",
            id="in-place",
        ),
        pytest.param(
            lambda: conditional(lambda g, x: [g.call_function(aten.nonzero.default, (x,)), *negated(g, x)][1:]),
            "aoti:cpu",
            "choose.true/nonzero_default",
            "data-dependent shape",
            "the result of aten.nonzero.default depends on the data; leave it out of the branch",
            id="data-dependent",
        ),
    ],
)
def test_refusals(make: Callable[[], fx.GraphModule], target: str, where: str, rule: str, found: str) -> None:
    with pytest.raises(HastenError) as caught:
        require(make(), target)
    assert str(caught.value) == f"target {target}: {where} breaks the branch rule {rule!r}: {found}"


def nested(depth: int) -> fx.GraphModule:
    """A conditional in the compute branch of a conditional, and so on."""
    module = conditional()
    for _ in range(depth - 1):
        outer, inner = conditional(), {name: getattr(module, name) for name in ("compute", "reuse")}

        def body(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
            parts = [graph.get_attr(name) for name in ("compute", "reuse")]
            graph.call_function(torch.ops.higher_order.cond, (True, *parts, (x,)), name="choose")
            return negated(graph, x)

        outer.compute = branch(body, outer.graph.find_nodes(op="placeholder")[1].meta["val"], inner)
        module = outer
    return module


def test_depth() -> None:
    assert violations(nested(DEEPEST), "aoti:cpu") == []
    with pytest.raises(
        HastenError, match=r"breaks the branch rule 'depth': 17 conditionals stand in each other; nest at"
    ):
        require(nested(DEEPEST + 1), "aoti:cpu")
