"""`canonical`: shape arithmetic becomes constants, Attention gets its heads apart, and nothing else changes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

from hasten.passes import pipeline
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.rule import Fuel, Report

# Reshape targets as the TorchScript exporter writes them: sizes picked out of Shape, divided, put together again.
TORCHSCRIPT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[B,6,64] x) => (float[B,4,6,16] y) {
  s0 = Shape (x) i0 = Constant <value = int64 {0}> () b = Gather <axis = 0> (s0, i0)
  s2 = Shape (x) i2 = Constant <value = int64 {2}> () c = Gather <axis = 0> (s2, i2)
  heads = Constant <value = int64 {4}> () d = Div (c, heads)
  dc = Cast <to = 7> (d) dd = Cast <to = 7> (dc)
  ax = Constant <value = int64[1] {0}> ()
  b1 = Unsqueeze (b, ax) n1 = Constant <value = int64[1] {-1}> ()
  h1 = Constant <value = int64[1] {4}> () d1 = Unsqueeze (dd, ax)
  t = Concat <axis = 0> (b1, n1, h1, d1)
  r = Reshape (x, t)
  y = Transpose <perm = [0, 2, 1, 3]> (r)
}"""


def canonical(model, target="", fuel=None):
    graph = OnnxGraph(model)
    report = Report()
    context = pipeline.Context(target=target, fuel=Fuel(fuel))
    pipeline.run(graph, [("canonical", {})], context, report)
    return graph, report["canonical"]


def same(before, after, **feeds):
    runs = [
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
        for m in (before, after)
    ]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_shape_arithmetic_becomes_a_constant_target():
    model = parser.parse_model(TORCHSCRIPT)
    graph, report = canonical(model)
    assert graph.op_counts() == {"Reshape": 1, "Transpose": 1}
    assert report.count("reshape") == 1
    view = next(iter(graph.views()))
    assert view.shape("r") == ("B", 6, 4, 16)
    target = graph.to_model().graph.initializer[0]
    assert onnx.numpy_helper.to_array(target).tolist() == [0, -1, 4, 16]
    for batch in (1, 3):
        same(model, graph.to_model(), x=normal(batch, 6, 64))


def test_a_second_run_finds_nothing():
    graph, _ = canonical(parser.parse_model(TORCHSCRIPT))
    model = graph.to_model()
    again, report = canonical(model)
    assert report.hits == 0
    assert again.to_model() == model


def test_a_target_with_two_unknown_sizes_stays():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[B,6,64] x, int64[2] k) => (float[P,Q,R] y) {
      e = Constant <value = int64[1] {4}> () t = Concat <axis = 0> (k, e) y = Reshape (x, t) }"""
    graph, report = canonical(parser.parse_model(text))
    assert report.hits == 0
    assert graph.op_counts() == {"Concat": 1, "Constant": 1, "Reshape": 1}


def test_small_computations_on_constants_are_folded_and_large_ones_left():
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[2] x) => (float[2] y, float[300,300] z) <float[2] w = {1.0, 2.0}, int64[2] n = {300, 300}> {
      e = Exp (w) f = Add (e, w) y = Mul (x, f) z = ConstantOfShape (n) }"""
    model = parser.parse_model(text)
    graph, report = canonical(model)
    assert graph.op_counts() == {"ConstantOfShape": 1, "Mul": 1}
    assert {s.variant for s in report.sites} == {"fold"}
    same(model, graph.to_model(), x=normal(2))


def test_random_numbers_are_not_folded():
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[2] x) => (float[2] y) { r = RandomNormal <shape = [2]> () y = Mul (x, r) }"""
    assert canonical(parser.parse_model(text))[1].hits == 0


def test_folding_inside_branches_reads_outer_constants():
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (bool c, float[2,8] x) => (float[2,4,2] y) <int64[1] two = {2}, int64[1] four = {4}> {
      y = If (c) <then_branch: graph = t () => (float[2,4,2] r) {
                    k = Concat <axis = 0> (two, four, two) r = Reshape (x, k) },
                  else_branch: graph = e () => (float[2,4,2] s) {
                    m = Concat <axis = 0> (two, four, two) n = Neg (x) s = Reshape (n, m) }> }"""
    model = parser.parse_model(text)
    graph, report = canonical(model)
    assert [s.where for s in report.sites] == ["If.then_branch/k", "If.else_branch/m"]
    assert graph.op_counts() == {"If": 1, "Neg": 1, "Reshape": 2}
    for c in (True, False):
        same(model, graph.to_model(), c=np.array(c), x=normal(2, 8))


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("mask", ["", ", m"], ids=["plain", "masked"])
def test_attention_gets_its_heads_apart(opset, mask):
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    g (float[2,5,32] q, float[2,7,16] k, float[2,7,8] v, float[5,7] m) => (float[2,5,16] y) {{
      y = Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.3> (q, k, v{mask}) }}"""
    model = parser.parse_model(text)
    graph, report = canonical(model)
    assert [s.variant for s in report.sites] == ["heads"]
    assert next(iter(graph.views())).op("y").name == "reshape"
    feeds = {"q": normal(2, 5, 32), "k": normal(2, 7, 16), "v": normal(2, 7, 8), "m": normal(5, 7)}
    same(model, graph.to_model(), **feeds)


def test_attention_with_a_cache_keeps_its_form():
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[2,5,32] q, float[2,7,32] k, float[2,7,32] v, float[2,4,3,8] pk, float[2,4,3,8] pv)
      => (float[2,5,32] y, float[2,4,10,8] k2, float[2,4,10,8] v2) {
      y, k2, v2 = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v, , pk, pv) }"""
    assert canonical(parser.parse_model(text))[1].hits == 0


def test_fuel_counts():
    assert canonical(parser.parse_model(TORCHSCRIPT), fuel=1)[1].hits == 1


def test_what_is_fused_already_is_noted():
    text = """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
    g (float[2,5,32] q) => (float[2,5,32] y) { y = com.microsoft.MultiHeadAttention <num_heads = 4> (q, q, q) }"""
    graph, _ = canonical(parser.parse_model(text))
    assert graph.notes == ["1 com.microsoft.MultiHeadAttention is fused already and left as found"]
