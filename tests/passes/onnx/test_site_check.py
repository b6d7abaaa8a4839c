"""The check of single sites: a wrong replacement is taken back with a reason, and equal sites cost one check."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from hasten.passes.onnx import site_check
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.onnx.site_check import SiteCheck
from hasten.passes.pattern import Op, Var
from hasten.passes.rule import Rule, apply

SWISH = Op("mul", (Var("x"), Op("sigmoid", (Var("x"),))))


def rule(replace, pattern=SWISH):
    return Rule("swish", (("product", pattern),), replace, frozenset({"sigmoid"}))


def model(shape="float[2,N,8]", opset=18, count=1):
    nodes = " ".join(f"s{i} = Sigmoid (x{i}) x{i + 1} = Mul (x{i}, s{i})" for i in range(count))
    kind = shape.partition("[")[0]
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({shape} x0) => ({kind}[2,N,8] x{count}) {{ {nodes} }}'
    return parser.parse_model(text)


def checked(replace, check=None, **kwargs):
    graph = OnnxGraph(model(**kwargs))
    view = next(iter(graph.views()))
    check = check or SiteCheck()
    report = apply(rule(replace), view, verify=check)
    graph.clean()
    graph.check()
    return graph, report, check


def half_the_product(view, found, root):
    half = view.emit_constant(np.asarray(0.5, dtype=np.float32), at=root)
    inner = view.node_at("Mul", [found["x"], half], {}, at=root)
    one = view.emit_constant(np.asarray(1.0, dtype=np.float32), at=root)
    return view.emit(
        "mul", [inner, view.emit("add", [view.node_at("Tanh", [inner], {}, at=root), one], {}, at=root)], {}, at=root
    )


def test_an_equal_replacement_stays():
    # x sigmoid(x) = x/2 (1 + tanh(x/2))
    graph, report, check = checked(half_the_product)
    assert (report.hits, report.reverted, check.unchecked) == (1, (), 0)
    assert "Sigmoid" not in graph.op_counts()


def test_a_wrong_replacement_is_taken_back():
    graph, report, _ = checked(lambda view, found, root: view.node_at("Relu", [found["x"]], {}, at=root))
    assert report.hits == 0
    assert len(report.reverted) == 1
    assert report.reverted[0].where == "x1"
    assert report.reverted[0].reason.startswith("the result differs by ")
    assert graph.op_counts() == {"Mul": 1, "Sigmoid": 1}


def test_another_shape_or_type_is_a_difference():
    _, report, _ = checked(
        lambda view, found, root: view.node_at("Transpose", [found["x"]], {"perm": [0, 2, 1]}, at=root)
    )
    assert report.reverted[0].reason == "the result is (2, 8, 2) float32, it was (2, 2, 8) float32"
    _, report, _ = checked(lambda view, found, root: view.emit("cast", [found["x"]], {"to": "float16"}, at=root))
    assert report.reverted[0].reason == "the replacement is float16, it was float32"


def test_nodes_that_do_not_run_are_a_difference():
    _, report, _ = checked(lambda view, found, root: view.node_at("Warp", [found["x"]], {}, at=root, domain="acme"))
    assert report.reverted[0].reason == "the new nodes cannot be run"


@pytest.mark.parametrize(("error", "reverted"), [(1e-5, 0), (1e-3, 1)], ids=["rounding", "wrong"])
def test_the_tolerance_is_that_of_the_type(error, reverted):
    def nearly(view, found, root):
        factor = view.emit_constant(np.asarray(1.0 + error, dtype=np.float32), at=root)
        return view.emit("mul", [half_the_product(view, found, root), factor], {}, at=root)

    assert len(checked(nearly)[1].reverted) == reverted


def test_half_precision_and_bfloat16():
    def same(view, found, root):
        sigmoid = view.node_at("Sigmoid", [found["x"]], {}, at=root)
        return view.emit("mul", [sigmoid, found["x"]], {}, at=root)

    def wrong(view, found, root):
        return view.node_at("Sigmoid", [found["x"]], {}, at=root)

    for kind in ("float16", "bfloat16", "double"):
        _, report, check = checked(same, shape=f"{kind}[2,N,8]")
        assert (report.hits, check.unchecked) == (1, 0)
        _, report, _ = checked(wrong, shape=f"{kind}[2,N,8]")
        assert len(report.reverted) == 1


def test_equal_sites_are_checked_once(monkeypatch):
    runs = []
    real = site_check._run
    monkeypatch.setattr(site_check, "_run", lambda *a: runs.append(a[1]) or real(*a))
    _, report, _ = checked(half_the_product, count=12)
    assert report.hits == 12
    assert runs == [0, 1]


def test_sites_of_other_weights_are_equal_and_of_other_attributes_not(monkeypatch):
    runs = []
    real = site_check._run
    monkeypatch.setattr(site_check, "_run", lambda *a: runs.append(a[1]) or real(*a))
    nodes, weights = [], []
    for i, alpha in enumerate((0.1, 0.1, 0.2)):
        weights.append(numpy_helper.from_array(np.full((128, 128), i, dtype=np.float32), f"w{i}"))
        nodes.append(helper.make_node("LeakyRelu", [f"x{i}"], [f"l{i}"], alpha=alpha))
        nodes.append(helper.make_node("MatMul", [f"l{i}", f"w{i}"], [f"x{i + 1}"]))
    info = helper.make_tensor_value_info("x0", 1, [4, 128])
    graph = helper.make_graph(nodes, "g", [info], [helper.make_tensor_value_info("x3", 1, [4, 128])], weights)
    loaded = OnnxGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    view = next(iter(loaded.views()))

    def same(view, found, root):
        attrs = view.node(found["a"]).attrs
        again = view.node_at("LeakyRelu", [view.node(found["a"]).inputs[0].name], dict(attrs), at=root)
        return view.node_at("MatMul", [again, found["w"]], {}, at=root)

    leaky = Rule("again", (("product", Op("matmul", (Var("a"), Var("w")))),), same, frozenset({"matmul"}))
    assert apply(leaky, view, verify=SiteCheck()).hits == 3
    assert runs == [0, 1, 0, 1]


def test_sites_that_are_too_large_are_counted():
    _, report, check = checked(half_the_product, shape="float[2,100000000,8]")
    assert (report.hits, check.unchecked) == (1, 1)


def test_sites_that_cannot_be_run_as_they_were_are_counted():
    text = """<ir_version: 10, opset_import: ["" : 18, "acme" : 1]>
      g (float[2,8] x) => (float[2,8] y) { a = acme.Warp (x) s = Sigmoid (a) y = Mul (a, s) }"""
    graph = OnnxGraph(parser.parse_model(text))
    view, check = next(iter(graph.views())), SiteCheck()
    report = apply(rule(half_the_product), view, verify=check)
    assert (report.hits, check.unchecked) == (1, 1)


def test_masked_rows_that_were_nan_may_be_anything():
    text = """<ir_version: 10, opset_import: ["" : 18]>
      g (float[2,4,5,8] q, bool[5,5] m) => (float[2,4,5,8] y) <float i = {-inf}> {
        k = Transpose <perm = [0, 1, 3, 2]> (q) p = MatMul (q, k) s = Where (m, p, i) w = Softmax <axis = -1> (s)
        y = MatMul (w, q) }"""
    from hasten.backends.optimize import optimize_onnx

    _, report = optimize_onnx(parser.parse_model(text), target="onnxruntime:cpu", expect={"attention": 1}, strict=True)
    assert not report.reverted


def test_a_symbolic_size_is_the_same_everywhere():
    text = """<ir_version: 10, opset_import: ["" : 18]>
      g (float[B,4,N,8] q, float[B,4,M,8] k, float[B,1,N,M] m) => (float[B,4,N,8] y) {
        t = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, t) s = Add (p, m) w = Softmax <axis = -1> (s)
        y = MatMul (w, k) }"""
    from hasten.backends.optimize import optimize_onnx

    model = parser.parse_model(text)
    out, report = optimize_onnx(model, target="onnxruntime:cpu", expect={"attention": 1}, strict=True)
    assert not any("too large" in note for note in report.notes)
    onnx.checker.check_model(out, full_check=True)
