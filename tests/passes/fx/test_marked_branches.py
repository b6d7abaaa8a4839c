"""Conditionals are exported in line, and are an ``If`` again in the ONNX model."""

import gc
import weakref

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from hasten.passes.fx.marked_branches import in_line
from hasten.passes.fx.to_onnx import onnx_from_graph

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Chosen(nn.Module):
    """Both branches read a weight and hand an operand on; one has a branch inside."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shared = nn.Parameter(torch.arange(4.0))

    def forward(self, x, computes, doubles):
        y = x * self.shared

        def yes(x, y):
            inner = torch.cond(doubles > 0, lambda a: (a * 2 + self.shared,), lambda a: (a - self.linear(a),), (y,))
            return torch.relu(self.linear(x)) + inner[0], x.clone()

        def no(x, y):
            return x + self.shared, y.clone()

        first, second = torch.cond(computes > 0, yes, no, (x, y))
        return first + y, second


def exported(module, args, dynamic_shapes=None):
    program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes)
    return program.module(check_guards=False), onnx_from_graph(
        program.module(check_guards=False), args, 22, dynamic_shapes
    )


def run(model, *tensors):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return session.run(None, feeds)


def numbers(*values):
    return tuple(torch.tensor(v) for v in values)


@pytest.fixture(scope="module")
def chosen():
    torch.manual_seed(0)
    return Chosen().eval()


@pytest.mark.parametrize("computes", [0, 1])
@pytest.mark.parametrize("doubles", [0, 1])
@pytest.mark.parametrize("rows", [3, 5])
def test_every_way_through_nested_branches_computes_what_the_module_does(chosen, computes, doubles, rows):
    sizes = ({0: torch.export.Dim("rows", min=2, max=9)}, None, None) if rows != 3 else None
    _, model = exported(chosen, (X, *numbers(1, 1)), sizes)
    x = torch.linspace(-2, 1, 4 * rows).reshape(rows, 4)
    given = (x, *numbers(computes, doubles))
    with torch.no_grad():
        wanted = chosen(*given)
    for found, want in zip(run(model, *given), wanted, strict=True):
        np.testing.assert_allclose(found, want.numpy(), atol=1e-6)


def test_a_branch_holds_what_it_alone_needs(chosen):
    _, model = exported(chosen, (X, *numbers(1, 1)))
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("If") == 1
    assert "MatMul" not in ops
    assert "Gemm" not in ops
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    branches = {a.name: [node.op_type for node in a.g.node] for a in choice.attribute}
    yes, no = branches["then_branch"], branches["else_branch"]
    assert yes.count("If") == 1
    assert "Relu" in yes
    assert set(no) == {"Add", "Identity"}
    assert not [n for n in model.graph.node if n.domain == "hasten"]
    assert [i.name for i in model.graph.input] == ["x", "computes", "doubles"]


def test_what_is_marked_has_no_conditional_left(chosen):
    graph, _ = exported(chosen, (X, *numbers(1, 1)))
    assert not in_line(graph).graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)) == 1


class Deep(nn.Module):
    """What the outer branch is given is read in one branch of the inner one alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(X * 5)

    def forward(self, x, computes, doubles):
        def yes(x):
            return torch.cond(doubles > 0, lambda a: (a * 2,), lambda a: (self.weight + 1,), (x,))

        return torch.cond(computes > 0, yes, lambda x: (x - 1,), (x * 3,))[0]


@pytest.mark.parametrize(("computes", "doubles", "wanted"), [(1, 1, X * 6), (1, 0, X * 5 + 1), (0, 1, X * 3 - 1)])
def test_marks_of_an_outer_branch_do_not_end_in_an_inner_one(computes, doubles, wanted):
    _, model = exported(Deep().eval(), (X, *numbers(1, 1)))
    (found,) = run(model, X, *numbers(computes, doubles))
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    assert b"BranchEnter" not in model.SerializeToString()


def test_an_export_leaves_no_weights_behind():
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    given = (torch.ones(2, 32),)
    exported(module, given)
    seen = [weakref.ref(p) for p in module.parameters()]
    del module
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4
