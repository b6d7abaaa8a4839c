"""Defects found in other graph optimisers, each as a test that this one does not have it."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, parser

from hasten.backends.optimize import optimize_onnx
from hasten.passes.onnx import io


def run(model, **feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


ATTENTION = """<ir_version: 10, opset_import: ["" : {opset}]>
g (float[{b},{n},32] x) => (float[{b},{n},32] y{more})
<int64[4] s = {{0, 0, 4, 8}}, int64[3] t = {{0, 0, 32}}, float f = {{0.35}}> {{
  q4 = Reshape (x, s) q = Transpose <perm = [0, 2, 1, 3]> (q4)
  k = Transpose <perm = [0, 2, 3, 1]> (q4)
  p = MatMul (q, k) ps = Mul (p, f) w = Softmax <axis = -1> (ps) o = MatMul (w, q)
  ot = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape (ot, t)
}}"""


@pytest.mark.parametrize("read", ["w", "ps", "p"], ids=["probabilities", "scaled", "scores"])
def test_an_intermediate_that_somebody_reads_never_gets_two_producers(read):
    """ONNX Runtime's fusion_mha_dit appends the fused node before its last guard; the session then refuses to load."""
    text = ATTENTION.format(opset=20, b=2, n=6, more=f", float[2,4,6,6] {read}")
    model = parser.parse_model(text)
    out, report = optimize_onnx(model, target="onnxruntime:cpu")
    assert report["attention"].hits == 0
    assert report["attention"].misses[0].reason.endswith("has a user outside the pattern")
    assert out.graph == model.graph or [n.op_type for n in out.graph.node] == [n.op_type for n in model.graph.node]
    for a, b in zip(run(model, x=normal(2, 6, 32)), run(out, x=normal(2, 6, 32)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


@pytest.mark.parametrize("opset", range(17, 27))
def test_every_opset_is_as_good_as_the_one_that_brought_attention(opset):
    """onnxscript's opset-23 fusions run when the opset is 23 exactly, ONNX Runtime's find nothing in newer exports."""
    model = parser.parse_model(ATTENTION.format(opset=opset, b="B", n="N", more=""))
    out, report = optimize_onnx(model, target="onnxruntime:cpu", expect={"attention": 1})
    assert len(out.graph.node) == 1
    assert sum(report.ops_after.values()) < sum(report.ops_before.values())
    np.testing.assert_allclose(run(out, x=normal(3, 5, 32))[0], run(model, x=normal(3, 5, 32))[0], atol=1e-5)


def test_sizes_from_one_element_arrays():
    """ONNX Runtime's get_num_heads takes int() of a one-element array, which NumPy 2.4 refuses, on dynamic axes."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[B,N,32] x) => (float[B,4,N,8] q)
    <int64[1] i = {2}, int64[1] four = {4}, int64[1] m = {-1}, int64[1] z = {0}> {
      s = Shape (x) w = Gather (s, i) d = Div (w, four) b = Gather (s, z) h = Concat <axis = 0> (b, m, four, d)
      q4 = Reshape (x, h) q = Transpose <perm = [0, 2, 1, 3]> (q4) }"""
    out, _ = optimize_onnx(parser.parse_model(text), target="onnxruntime:cpu")
    assert [n.op_type for n in out.graph.node] == ["Reshape", "Transpose"]


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_a_fused_group_norm_runs_on_the_cpu(opset):
    """onnxscript's optimize_for_ort writes com.microsoft.GroupNorm, which has no CPU kernel, at opsets 18 and 20."""
    if opset >= 21:
        norm = "n = GroupNormalization <num_groups = 2> (x, w, b)"
    else:
        norm = """r = Reshape (x, g) i = InstanceNormalization (r, o, z) m = Reshape (i, s)
                  wu = Unsqueeze (w, a) bu = Unsqueeze (b, a) p = Mul (m, wu) n = Add (p, bu)"""
    values = """<float[2] o = {1, 1}, float[2] z = {0, 0}, int64[3] g = {0, 2, -1}, int64[4] s = {1, 8, 4, 4},
                 int64[2] a = {1, 2}>"""
    text = f"""<ir_version: 9, opset_import: ["" : {opset}]> g (float[1,8,4,4] x, float[8] w, float[8] b)
      => (float[1,8,4,4] y) {values} {{ {norm} q = Sigmoid (n) y = Mul (n, q) }}"""
    model = parser.parse_model(text)
    out, report = optimize_onnx(model, target="onnxruntime:cpu", expect={"group-norm-act.silu": 1})
    assert not report.reverted
    feeds = {"x": normal(1, 8, 4, 4), "w": normal(8), "b": normal(8)}
    np.testing.assert_allclose(run(out, **feeds)[0], run(model, **feeds)[0], atol=1e-5)


def test_a_shape_free_export_does_not_grow():
    """ONNX Runtime's UNet optimizer finds no GroupNorm without Shape nodes, and adds transposes around Conv."""
    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[1,8,4,4] x, float[8,8,3,3] k) => (float[1,8,4,4] y)
      <float[2] o = {1, 1}, float[2] z = {0, 0}, int64[3] g = {0, 2, -1}, int64[4] s = {1, 8, 4, 4}> {
        r = Reshape (x, g) i = InstanceNormalization (r, o, z) m = Reshape (i, s) q = Sigmoid (m) a = Mul (m, q)
        y = Conv <pads = [1, 1, 1, 1]> (a, k) }"""
    model = parser.parse_model(text)
    out, report = optimize_onnx(model, target="onnxruntime:cpu", expect={"group-norm-act.silu": 1})
    assert sum(report.ops_after.values()) <= sum(report.ops_before.values())
    assert not {"NhwcConv", "Cast"} & {n.op_type for n in out.graph.node}


def test_a_mask_is_never_taken_for_a_causal_one():
    """torch_tensorrt by default turns a square additive mask into a causal one."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
      g (float[1,2,5,8] q, float[5,5] m) => (float[1,2,5,8] y) {
        k = Transpose <perm = [0, 1, 3, 2]> (q) p = MatMul (q, k) s = Add (p, m) w = Softmax <axis = -1> (s)
        y = MatMul (w, q) }"""
    model = parser.parse_model(text)
    out, _ = optimize_onnx(model, target="onnxruntime:cpu", expect={"attention.masked": 1})
    (node,) = [n for n in out.graph.node if n.op_type == "Attention"]
    assert {a.name: a.i for a in node.attribute}["is_causal"] == 0
    feeds = {"q": normal(1, 2, 5, 8), "m": normal(5, 5)}
    np.testing.assert_allclose(run(out, **feeds)[0], run(model, **feeds)[0], atol=1e-5)


def test_external_data_of_a_tiny_model(tmp_path):
    """The dynamo exporter writes external data for tiny models, which a runtime refuses when given the bytes."""
    weight = onnx.numpy_helper.from_array(normal(64, 64), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    io.write(model, tmp_path / "m.onnx", external=True)
    out, _ = optimize_onnx(tmp_path / "m.onnx")
    np.testing.assert_allclose(run(out, x=normal(3, 64))[0], normal(3, 64) @ normal(64, 64), atol=1e-4)


def test_one_group_is_not_left_to_tensorrts_group_normalization():
    """TensorRT 10.16 computes GroupNormalization with one group as an instance norm."""
    text = """<ir_version: 10, opset_import: ["" : 22]>
      g (float[1,8,4,4] x, float[8] w, float[8] b) => (float[1,8,4,4] y)
      { y = GroupNormalization <num_groups = 1> (x, w, b) }"""
    model = parser.parse_model(text)
    out, _ = optimize_onnx(model, target="tensorrt:sm90", expect={"group-norm-act": 1})
    assert "GroupNormalization" not in {n.op_type for n in out.graph.node}
    feeds = {"x": normal(1, 8, 4, 4), "w": normal(8), "b": normal(8)}
    np.testing.assert_allclose(run(out, **feeds)[0], run(model, **feeds)[0], atol=1e-5)


def test_half_precision_scores_do_not_overflow():
    """Products of unscaled half-precision queries and keys overflow: queries are scaled first, or it is float32."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
      g (float16[1,1,4,64] q) => (float16[1,1,4,64] y) <float e = {0.125}> {
        f = Cast <to = 10> (e)
        k = Transpose <perm = [0, 1, 3, 2]> (q) s = Mul (q, f) p = MatMul (s, k) w = Softmax <axis = -1> (p)
        y = MatMul (w, q) }"""
    model = parser.parse_model(text)
    for target in ("onnxruntime:cpu", "tensorrt-rtx:sm89"):
        out, _ = optimize_onnx(model, target=target, expect={"attention": 1})
        q = np.full((1, 1, 4, 64), 40.0, dtype=np.float16)
        assert np.isfinite(run(out, q=q)[0]).all()
