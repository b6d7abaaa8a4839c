"""`legalise`: what each target gets, that it computes the same, and why the rest was left."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper, parser

from hasten.backends.optimize import optimize_onnx
from hasten.passes.onnx.graph import OnnxGraph

RNG = np.random.default_rng(0)


def graph_of(body, signature, output, opset=23, initializers="", domains=', "hasten" : 1, "com.microsoft" : 1'):
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>'
    return parser.parse_model(f"{header} g ({signature}) => ({output}) {initializers} {{ {body} }}")


def legalise(model, target):
    out, report = optimize_onnx(model, target=target, passes="legalise")
    onnx.checker.check_model(out, full_check=True)
    ops = {k: v for k, v in report.ops_after.items() if k != "Constant"}
    return out, ops, report["legalise"]


def feeds_of(model):
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = RNG.random(shape) > 0.4 if dtype == np.bool_ else RNG.normal(size=shape).astype(dtype)
    return feeds


def run(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def check(before, after, tolerance=2e-5):
    feeds = feeds_of(before)
    for a, b in zip(run(OnnxGraph(before).to_model(), feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, atol=tolerance * max(1.0, float(np.abs(a).max())), rtol=0)


HEADS = """
  q4 = Reshape (q, s) q5 = Transpose <perm = [0, 2, 1, 3]> (q4)
  k4 = Reshape (k, s) k5 = Transpose <perm = [0, 2, 1, 3]> (k4)
  v4 = Reshape (v, s) v5 = Transpose <perm = [0, 2, 1, 3]> (v4)
  a = hasten.Attention <scale = 0.4, causal = {causal}> (q5, k5, v5{mask})
  b = Transpose <perm = [0, 2, 1, 3]> (a) y = Reshape (b, t)
"""
SIZES = "<int64[4] s = {0, 0, 4, 8}, int64[3] t = {0, 0, 32}>"
QKV = "float[2,6,32] q, float[2,M,32] k, float[2,M,32] v"


def split_heads(opset, mask="", causal=0, signature=QKV):
    return graph_of(HEADS.format(mask=mask, causal=causal), signature, "float[2,6,32] y", opset, SIZES)


class TestOnnxRuntime:
    def test_attention_with_split_heads_before_opset_23(self):
        model = split_heads(18)
        out, ops, report = legalise(model, "onnxruntime:cpu")
        assert ops == {"com.microsoft.MultiHeadAttention": 1}
        assert [(s.variant, s.spelling) for s in report.sites] == [("Attention", "com.microsoft.MultiHeadAttention")]
        check(model, out)

    @pytest.mark.parametrize("opset", [23, 24])
    @pytest.mark.parametrize("causal", [0, 1], ids=["plain", "causal"])
    @pytest.mark.parametrize(
        ("mask", "more"),
        [
            ("", set()),
            ("bool[2,1,6,M]", set()),
            ("bool[6,M]", {"Unsqueeze"}),
            ("float[6,M]", {"Unsqueeze"}),
            ("float[4,6,M]", {"Unsqueeze"}),
            ("bool[2,1,1,M]", {"Expand", "Concat", "Gather", "Shape"}),
            ("bool[2,1,1,3]", {"Expand"}),
            ("bool[6,1]", {"Unsqueeze", "Expand", "Concat", "Gather", "Shape"}),
        ],
    )
    def test_attention_with_split_heads(self, opset, causal, mask, more):
        signature = QKV + (f", {mask} m" if mask else "")
        if mask.endswith("3]"):
            signature = signature.replace("M", "3")
        model = split_heads(opset, ", m" if mask else "", causal, signature)
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        assert ops == dict.fromkeys({"Attention"} | more, 1)
        check(model, out)

    def test_a_mask_of_unknown_fit_is_not_given_to_the_kernel(self):
        model = split_heads(23, ", m", 0, QKV + ", bool[2,1,6,P] m")
        out, ops, report = legalise(model, "onnxruntime:cpu")
        assert "hasten.Attention" in ops
        assert report.misses[0].reason == (
            "hasten.Attention: kept as a function: a mask of shape (2, 1, 6, 'P') is not known to fit (6, 'M') rows "
            "and keys"
        )
        check(model, out)

    def test_a_row_without_keys_stays_zero(self):
        model = split_heads(23, ", m", 0, QKV.replace("M", "3") + ", bool[2,1,6,3] m")
        out, _, _ = legalise(model, "onnxruntime:cpu")
        feeds = feeds_of(model)
        feeds["m"][0, 0, 2] = False
        assert (run(out, feeds)[0][0, 2] == 0).all()

    def test_much_attention_goes_to_the_flash_kernel(self):
        signature = "float[1,1024,32] q, float[1,1024,32] k, float[1,1024,32] v"
        model = graph_of(HEADS.format(mask="", causal=0), signature, "float[1,1024,32] y", 23, SIZES)
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        assert ops == {"com.microsoft.MultiHeadAttention": 1}
        check(model, out)

    def test_attention_of_separate_heads(self):
        body = "y = hasten.Attention <scale = 0.4, causal = 0> (q, k, v)"
        signature, output = "float[2,4,5,8] q, float[2,2,7,8] k, float[2,2,7,6] v", "float[2,4,5,6] y"
        model = graph_of(body, signature, output, 23)
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        assert ops == {"Attention": 1}
        check(model, out)
        old = graph_of(body, signature, output, 20)
        out, ops, report = legalise(old, "onnxruntime:cpu")
        assert ops == {"hasten.Attention": 1}
        assert [m.reason for m in report.misses] == [
            "hasten.Attention: kept as a function: before opset 23 there is no kernel for it with a mask or from "
            "separate heads"
        ]
        check(old, out)

    @pytest.mark.parametrize("opset", [17, 20, 22])
    @pytest.mark.parametrize("act", ["none", "silu", "gelu", "gelu_tanh", "quick_gelu"])
    @pytest.mark.parametrize("size", ["5", "W"], ids=["static", "dynamic"])
    def test_group_norm_act(self, opset, act, size):
        body = f'y = hasten.GroupNormAct <groups = 3, eps = 0.00001, act = "{act}"> (x, w, b)'
        model = graph_of(body, f"float[B,6,4,{size}] x, float[6] w, float[6] b", f"float[B,6,4,{size}] y", opset)
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        wanted = {"InstanceNormalization": 1, "BatchNormalization": 1, "Reshape": 2} | (
            {"Shape": 1} if size == "W" else {}
        )
        gelu = {"gelu": "com.microsoft.Gelu", "gelu_tanh": "com.microsoft.FastGelu"} if opset < 20 else {}
        last = {"none": None, "silu": "com.microsoft.QuickGelu", "quick_gelu": "com.microsoft.QuickGelu"} | gelu
        assert ops == wanted | ({name: 1} if (name := last.get(act, "Gelu")) else {})
        check(model, out)

    def test_group_norm_with_a_scale_and_shift(self):
        body = 'y = hasten.GroupNormAct <groups = 3, eps = 0.00001, act = "silu"> (x, w, b, s, t)'
        signature = "float[2,6,4,5] x, float[6] w, float[6] b, float[2,6,1,1] s, float[2,6,1,1] t"
        model = graph_of(body, signature, "float[2,6,4,5] y", 20)
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        assert not any(op.startswith("hasten") for op in ops)
        check(model, out)

    @pytest.mark.parametrize("opset", [13, 18, 20])
    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_geglu(self, opset, approximate):
        body = f'y = hasten.Geglu <approximate = "{approximate}", gate_first = 1> (x)'
        model = graph_of(body, "float[2,N,8] x", "float[2,N,4] y", opset)
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        assert sum(ops.values()) == 3
        assert {"Split", "Mul"} <= ops.keys()
        check(model, out)

    def test_half_precision_stays_a_function(self):
        body = 'y = hasten.Geglu <approximate = "none", gate_first = 0> (x)'
        model = graph_of(body, "float16[2,3,8] x", "float16[2,3,4] y", 20)
        out, ops, report = legalise(model, "onnxruntime:cpu")
        assert ops == {"hasten.Geglu": 1}
        assert [m.reason for m in report.misses] == [
            "hasten.Geglu: kept as a function: the kernels for float32 only are used, and its body computes in float32"
        ]
        check(model, out, 1e-3)

    def test_contrib_operators_without_a_cpu_kernel_are_rewritten(self):
        body = """
          n = com.microsoft.GroupNorm <groups = 2, activation = 1, epsilon = 0.00001> (x, w, b)
          t = Reshape (n, s) a = com.microsoft.BiasAdd (t, w, t) y = com.microsoft.BiasSplitGelu (a, w)"""
        model = graph_of(
            body, "float[2,4,4,4] x, float[4] w, float[4] b", "float[2,16,2] y", 18, "<int64[3] s = {2, 16, 4}>"
        )
        with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|Could not find an implementation"):
            run(model, feeds_of(model))
        out, ops, _ = legalise(model, "onnxruntime:cpu")
        assert not {"com.microsoft.GroupNorm", "com.microsoft.BiasAdd", "com.microsoft.BiasSplitGelu"} & ops.keys()
        feeds = feeds_of(model)
        x = feeds["x"].transpose(0, 3, 1, 2).reshape(2, 2, -1)
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        y = y.reshape(2, 4, 16) * feeds["w"][:, None] + feeds["b"][:, None]
        y = (y / (1 + np.exp(-y))).transpose(0, 2, 1)
        y = 2 * y + 2 * feeds["w"]
        half = y[..., 2:]
        gelu = 0.5 * half * (1 + np.vectorize(__import__("math").erf)(half / np.sqrt(2)))
        np.testing.assert_allclose(run(out, feeds)[0], y[..., :2] * gelu, atol=1e-5)

    def test_what_has_no_kernel_and_no_rewrite_is_reported(self):
        body = "y = com.microsoft.SkipGroupNorm <groups = 2, activation = 0> (x, w, w, x)"
        model = graph_of(body, "float[2,4,4,4] x, float[4] w", "float[2,4,4,4] y", 18)
        _, report = optimize_onnx(model, target="onnxruntime:cpu", passes="legalise")
        assert [m.reason for m in report["legalise"].misses] == [
            "com.microsoft.SkipGroupNorm: ONNX Runtime has a kernel for it on CUDA only"
        ]


class TestTensorRT:
    TARGET = "tensorrt-rtx:sm89"

    def test_group_normalization_since_opset_21(self):
        body = 'y = hasten.GroupNormAct <groups = 3, eps = 0.00001, act = "silu"> (x, w, b)'
        signature = "float16[2,6,4,5] x, float16[6] w, float16[6] b"
        model = graph_of(body, signature, "float16[2,6,4,5] y", 22)
        out, ops, _ = legalise(model, self.TARGET)
        assert ops == {"GroupNormalization": 1, "Sigmoid": 1, "Mul": 1}
        check(model, out, 5e-3)
        old = graph_of(body, signature.replace("float16", "float"), "float[2,6,4,5] y", 20)
        out, ops, _ = legalise(old, self.TARGET)
        assert ops == {"Reshape": 3, "InstanceNormalization": 1, "Unsqueeze": 2, "Mul": 2, "Add": 1, "Sigmoid": 1}
        check(old, out)

    @pytest.mark.parametrize("opset", [18, 22, 23])
    def test_float32_attention_is_spelled_out(self, opset):
        model = split_heads(opset)
        out, ops, _ = legalise(model, self.TARGET)
        assert "Attention" not in ops
        assert ops["MatMul"] == 2
        check(model, out)

    def test_half_attention_stays_an_operator_outside_control_flow(self):
        body = "y = hasten.Attention <scale = 0.4, causal = 0> (q, k, v)"
        signature = "float16[2,4,5,8] q, float16[2,4,7,8] k, float16[2,4,7,8] v"
        _, ops, _ = legalise(graph_of(body, signature, "float16[2,4,5,8] y", 23), self.TARGET)
        assert ops == {"Attention": 1}
        wide = signature.replace(",8]", ",512]")
        _, ops, _ = legalise(graph_of(body, wide, "float16[2,4,5,512] y", 23), self.TARGET)
        assert "Attention" not in ops

    @pytest.mark.parametrize("op", ["hasten.Attention <scale = 0.4, causal = 0>", "Attention <scale = 0.4>"])
    def test_attention_in_a_branch_is_spelled_out(self, op):
        body = f"""y = If (c) <then_branch: graph = t () => (float16[2,4,5,8] r) {{ r = {op} (q, k, v) }},
                     else_branch: graph = e () => (float16[2,4,5,8] s) {{ s = Identity (q) }}>"""
        signature = "bool c, float16[2,4,5,8] q, float16[2,4,7,8] k, float16[2,4,7,8] v"
        _, ops, report = legalise(graph_of(body, signature, "float16[2,4,5,8] y", 23), self.TARGET)
        assert "Attention" not in ops
        assert ops["MatMul"] == 2
        assert [s.where for s in report.sites] == ["If.then_branch/r"]

    def test_contrib_operators_become_standard_ones(self):
        body = """a = com.microsoft.FastGelu (x, b) c = com.microsoft.BiasGelu (a, b)
                  y = com.microsoft.QuickGelu <alpha = 1.702> (c)"""
        for opset in (17, 22):
            model = graph_of(body, "float[2,3,4] x, float[4] b", "float[2,3,4] y", opset)
            out, ops, _ = legalise(model, self.TARGET)
            assert not any("." in op for op in ops)
            check(model, out)

    def test_nothing_of_ours_is_left(self):
        body = """n = hasten.GroupNormAct <groups = 2, eps = 0.00001, act = "gelu"> (x, w, w)
                  y = hasten.UpsampleConv2d (n, k, w)"""
        model = graph_of(body, "float[1,4,6,6] x, float[4] w, float[4,4,3,3] k", "float[1,4,12,12] y", 22)
        out, ops, _ = legalise(model, self.TARGET)
        assert not out.functions
        assert [o.domain for o in out.opset_import if o.domain == "hasten"] == []
        assert ops["Conv"] == 4
        check(model, out)


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "onnxruntime:cuda", "tensorrt:sm90", "tensorrt-rtx:sm89"])
@pytest.mark.parametrize("opset", [17, 20, 22, 23, 24])
def test_a_second_run_for_the_same_target_finds_nothing(target, opset):
    body = """
      q4 = Reshape (x, s) q5 = Transpose <perm = [0, 2, 1, 3]> (q4)
      k5 = Transpose <perm = [0, 2, 3, 1]> (q4)
      p = MatMul (q5, k5) ps = Mul (p, f) w1 = Softmax <axis = -1> (ps) o = MatMul (w1, q5)
      o1 = Transpose <perm = [0, 2, 1, 3]> (o) o2 = Reshape (o1, t)
      g = MatMul (o2, w) l = Slice (g, zero, eight, two) r = Slice (g, eight, sixteen, two)
      r1 = Div (r, root) r2 = Erf (r1) r3 = Add (r2, one) r4 = Mul (r, r3) r5 = Mul (r4, half) y = Mul (l, r5)"""
    values = """<int64[4] s = {0, 0, 2, 4}, int64[3] t = {0, 0, 8}, float f = {0.5}, int64[1] zero = {0},
      int64[1] eight = {8}, int64[1] sixteen = {16}, int64[1] two = {2},
      float root = {1.4142135}, float one = {1.0}, float half = {0.5}>"""
    model = graph_of(body, "float[2,5,8] x, float[8,16] w", "float[2,5,8] y", opset, values, domains="")
    once, first = optimize_onnx(model, target=target, expect={"attention": 1, "geglu": 1, "gelu": 1})
    assert not first.reverted
    check(model, once)
    twice, second = optimize_onnx(once, target=target)
    assert {r.name: r.hits for r in second.rules if r.hits} == {}
    assert twice.graph == once.graph


def test_weights_of_an_upsampled_convolution_are_not_stored_twice():
    weight = numpy_helper.from_array(RNG.normal(size=(8, 8, 3, 3)).astype(np.float32), "k")
    body = (
        'u = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , s)'
    )
    body += " y = Conv <pads = [1, 1, 1, 1]> (u, k)"
    model = graph_of(
        body, "float[1,8,6,6] x", "float[1,8,12,12] y", 18, "<float[4] s = {1.0, 1.0, 2.0, 2.0}>", domains=""
    )
    model.graph.initializer.append(weight)
    out, report = optimize_onnx(model, target="onnxruntime:cpu", expect={"upsample-conv": 1})
    assert [i.name for i in out.graph.initializer] == ["k"]
    assert [m.reason for m in report["legalise"].misses] == [
        "hasten.UpsampleConv2d: kept as a function: its four convolutions are the fastest spelling"
    ]
    check(model, out)
