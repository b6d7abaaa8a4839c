"""`OnnxGraph`: what is in the file stays in the file, whatever is rewritten around it."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from hasten.errors import VerificationError
from hasten.passes import pipeline
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.rule import Fuel, Report

IF = """<ir_version: 10, opset_import: ["" : 18]>
g (bool c, float[2,4] x) => (float[2,4] y) {
  a = Sigmoid (x)
  y = If (c) <then_branch: graph = t () => (float[2,4] r) { s = Sigmoid (a) r = Mul (a, s) },
              else_branch: graph = e () => (float[2,4] r2) { r2 = Mul (x, a) }>
}"""


def run(graph, *steps, **context):
    report = Report()
    pipeline.run(graph, [(s, {}) for s in steps], pipeline.Context(**context), report)
    return report


def results(model, **feeds):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def rich_model():
    """Everything that a careless rewriter drops."""
    model = parser.parse_model(IF)
    model.graph.doc_string = "about the graph"
    model.doc_string, model.model_version, model.producer_name = "about the model", 7, "maker"
    model.metadata_props.add(key="who", value="me")
    model.graph.metadata_props.add(key="where", value="here")
    node = model.graph.node[0]
    node.name, node.doc_string = "first", "about the node"
    node.metadata_props.add(key="line", value="12")
    model.graph.node[1].name = "choice"
    model.opset_import.append(helper.make_opsetid("acme", 3))
    return model


def test_round_trip_keeps_names_metadata_and_doc_strings():
    model = rich_model()
    back = OnnxGraph(model).to_model(infos=False)
    assert back == model


def test_rare_attributes_survive():
    type_proto = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    nodes = [
        helper.make_node("Optional", [], ["o"], type=helper.make_optional_type_proto(type_proto)),
        helper.make_node("OptionalHasElement", ["o"], ["y"]),
        helper.make_node("Blur", ["x"], ["z"], domain="acme", kinds=["a", "b"], empty=helper.make_attribute("e", 1).i),
    ]
    nodes[2].attribute.add(name="nothing", type=onnx.AttributeProto.INTS)
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.BOOL, []),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [2]),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])], outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    assert OnnxGraph(model).to_model(infos=False) == model


def test_an_unsorted_graph_is_sorted():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { a = Relu (x) y = Neg (a) }'
    )
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    graph = OnnxGraph(model)
    graph.check()
    assert [n.op_type for n in graph.to_model().graph.node] == ["Relu", "Neg"]


def test_no_change_leaves_the_text_as_it_was():
    graph = OnnxGraph(rich_model())
    before = graph.text()
    report = run(graph, "gelu", "geglu", "attention", "upsample-conv")
    assert not any(r.hits for r in report.rules)
    assert graph.text() == before


def test_uses_count_slots_outputs_and_inner_graphs():
    graph = OnnxGraph(parser.parse_model(IF))
    main, then, other = graph.views()
    assert [v.scope.path for v in (then, other)] == ["If.then_branch", "If.else_branch"]
    # a: once in Sigmoid, once in Mul of one branch, once in Mul of the other.
    assert main.uses("a") == 3
    assert then.uses("a") == 3
    assert main.uses("x") == 2
    assert then.uses("r") == 1
    squared = OnnxGraph(
        parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y, float[2] x2) '
            "{ x2 = Relu (x) y = Mul (x2, x2) }"
        )
    )
    assert next(iter(squared.views())).uses("x2") == 3


def test_outer_values_can_be_read_but_not_looked_into():
    graph = OnnxGraph(parser.parse_model(IF))
    _, then, _ = graph.views()
    assert then.op("a") is None
    assert then.shape("a") == (2, 4)
    assert then.op("s") is not None


def test_rewrites_inside_branches():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (bool c, float[2,3,8] x) => (float[2,3,4] y) {
      y = If (c) <then_branch: graph = t () => (float[2,3,4] r) {
          a, b = Split <axis = -1, num_outputs = 2> (x) e = Gelu (b) r = Mul (a, e) },
        else_branch: graph = e () => (float[2,3,4] r2) { r2, u = Split <axis = -1, num_outputs = 2> (x) }>
    }"""
    model = parser.parse_model(text)
    graph = OnnxGraph(model)
    report = run(graph, "geglu")
    assert report["geglu"].hits == 1
    assert report["geglu"].sites[0].where == "If.then_branch/r"
    assert graph.op_counts() == {"If": 1, "Split": 1, "hasten.Geglu": 1}
    out = graph.to_model()
    onnx.checker.check_model(out, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    for c in (True, False):
        (before,), (after,) = results(model, c=np.array(c), x=x), results(out, c=np.array(c), x=x)
        np.testing.assert_allclose(after, before, atol=1e-6)


def test_rewrites_inside_local_functions():
    text = """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
    g (float[2,3,8] x) => (float[2,3,4] y) { y = mine.Gate (x) }
    <domain: "mine", opset_import: ["" : 20]> Gate (x) => (r)
    { a, b = Split <axis = -1, num_outputs = 2> (x) e = Gelu (b) r = Mul (a, e) }"""
    model = parser.parse_model(text)
    graph = OnnxGraph(model)
    report = run(graph, "geglu")
    assert [s.where for s in report["geglu"].sites] == ["mine.Gate/r"]
    out = graph.to_model()
    assert sorted((f.domain, f.name) for f in out.functions) == [("hasten", "Geglu"), ("mine", "Gate")]
    onnx.checker.check_model(out, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(results(out, x=x)[0], results(model, x=x)[0], atol=1e-6)


def test_a_function_called_with_different_shapes_is_only_as_known_as_they_agree():
    text = """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
    g (float[2,8] x, float[5,8] z) => (float[2,8] y, float[5,8] w) { y = mine.F (x) w = mine.F (z) }
    <domain: "mine", opset_import: ["" : 20]> F (x) => (r) { r = Relu (x) }"""
    _, body = OnnxGraph(parser.parse_model(text)).views()
    first, second = body.shape("x")
    assert isinstance(first, str)
    assert second == 8


def test_graph_outputs_keep_their_names():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2,8] x) => (float[2,4] y, float[2,4] again) {
      a, b = Split <axis = -1, num_outputs = 2> (x) e = Gelu (b) y = Mul (a, e) again = Identity (y) }"""
    graph = OnnxGraph(parser.parse_model(text))
    run(graph, "geglu")
    model = graph.to_model()
    assert [o.name for o in model.graph.output] == ["y", "again"]
    assert [(n.op_type, list(n.output)) for n in model.graph.node] == [("Geglu", ["y"]), ("Identity", ["again"])]


def test_a_value_that_is_replaced_hands_its_name_on():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2,8] x) => (float[2,4] out) {
      a, b = Split <axis = -1, num_outputs = 2> (x) e = Gelu (b) gated = Mul (a, e) out = Relu (gated) }"""
    graph = OnnxGraph(parser.parse_model(text))
    run(graph, "geglu")
    assert [list(n.output) for n in graph.to_model().graph.node] == [["gated"], ["out"]]


def test_new_nodes_carry_the_rules_name():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2,8] x) => (float[2,4] y) { a, b = Split <axis = -1, num_outputs = 2> (x) e = Gelu (b) y = Mul (a, e) }"""
    graph = OnnxGraph(parser.parse_model(text))
    run(graph, "geglu")
    assert [(p.key, p.value) for p in graph.to_model().graph.node[0].metadata_props] == [("hasten.rule", "geglu")]


def test_fuel_stops_rewriting():
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2,8] x) => (float[2,8] y) <float h = {0.70710678}, float o = {1.0}, float p = {0.5}> {
      a = Mul (x, h) b = Erf (a) c = Add (b, o) d = Mul (x, c) m = Mul (d, p) n = Relu (m)
      a2 = Mul (n, h) b2 = Erf (a2) c2 = Add (b2, o) d2 = Mul (n, c2) y = Mul (d2, p) }"""
    for fuel in (0, 1, 2, None):
        graph = OnnxGraph(parser.parse_model(text))
        assert run(graph, "gelu", fuel=Fuel(fuel))["gelu"].hits == (2 if fuel is None else fuel)
        graph.check()


def test_overridable_initializers_are_no_constants():
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2] x, float w) => (float[2] y) <float w = {2.0}> { y = Mul (x, w) }"""
    view = next(iter(OnnxGraph(parser.parse_model(text)).views()))
    assert view.constant("w") is None
    old = parser.parse_model(text)
    old.ir_version = 3
    assert next(iter(OnnxGraph(old).views())).constant("w") is not None


def test_a_branch_that_gives_an_outer_value_counts_as_its_user():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (bool c, float[2] x) => (float[2] y) {
          a = Relu (x)
          y = If (c) <then_branch: graph = t () => (float[2] r) { r = Neg (x) },
                      else_branch: graph = e () => (float[2] a) { unused = Neg (x) }> }"""
    )
    graph = OnnxGraph(model)
    assert next(iter(graph.views())).uses("a") == 1


def test_shared_weights_of_branches_stay_where_they_were():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> {
          y = If (c) <then_branch: graph = t () => (float[2] r) { r = Mul (x, w) },
                      else_branch: graph = e () => (float[2] s) <float[2] v = {3.0, 4.0}>
                      { q = Add (x, v) s = Add (q, w) }>
        }"""
    )
    graph = OnnxGraph(model)
    graph.check()
    assert graph.to_model(infos=False) == model


def test_large_constants_are_left_out_of_checks_but_not_of_the_model():
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    ours = OnnxGraph(model)
    assert len(ours.to_model(strip=True).SerializeToString()) < 500
    assert next(iter(ours.views())).shape("y") == ("N", 64)
    assert ours.to_model() == model


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (
            lambda m: m.graph.node[1].input.__setitem__(0, "nowhere"),
            "second (Mul): reads 'nowhere', which nothing makes before it",
        ),
        (
            lambda m: m.graph.node[1].output.__setitem__(0, "s"),
            "second (Mul): makes 's', which something else makes as well",
        ),
    ],
    ids=["dangling", "twice"],
)
def test_verification_names_the_node(breaks, message):
    from hasten.passes.onnx.verify import verify_model

    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { s = Sigmoid (x) y = Mul (x, s) }'
    )
    model.graph.node[0].name, model.graph.node[1].name = "first", "second"
    breaks(model)
    with pytest.raises(VerificationError) as error:
        verify_model(model)
    assert str(error.value) == message


def test_verification_refuses_our_operators_without_a_body():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "hasten" : 1]> g (float[2] x) => (float[2] y) { y = hasten.Warp (x) }'
    )
    with pytest.raises(VerificationError) as error:
        OnnxGraph(model).check()
    assert str(error.value) == "y: hasten.Warp is an operator without a body"
