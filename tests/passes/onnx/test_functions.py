"""Function bodies: every fused operator in plain ONNX Runtime, against float64 references, at old and new opsets."""

import math

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from hasten.passes.onnx.element import type_of
from hasten.passes.onnx.graph import OnnxGraph

OPSETS = (11, 13, 17, 18, 20, 21, 23, 24)
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SCALE = float(np.float32(0.3))  # attributes are float32
EPS = float(np.float32(1e-5))
ERF = 1e-7  # onnx.reference computes Erf in float32
NORMAL = np.random.default_rng(0)


def erf(x):
    return np.vectorize(math.erf)(x)


def gelu(x, approximate):
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def activate(y, act):
    if act.startswith("gelu"):
        return gelu(y, "tanh" if act == "gelu_tanh" else "none")
    return y / (1 + np.exp(-{"silu": 1.0, "quick_gelu": 1.702}.get(act, 0.0) * y)) if act != "none" else y


def run(op, attrs, inputs, opset, dtype, *, dynamic=False):
    """One fused node with its body, through ONNX Runtime; bfloat16 goes in and out through casts, as numpy lacks it."""
    names = [f"i{n}" if x is not None else "" for n, x in enumerate(inputs)]
    element, rank = type_of(dtype), inputs[0].ndim
    infos, nodes, feeds = [], [], {}
    for name, x in zip(names, inputs, strict=True):
        if x is None:
            continue
        keeps = x.dtype == np.bool_
        dims = [f"{name}_{a}" if dynamic and a != 1 else d for a, d in enumerate(x.shape)]
        infos.append(helper.make_tensor_value_info(f"{name}_in", 9 if keeps else 11, dims))
        nodes.append(helper.make_node("Cast", [f"{name}_in"], [name], to=9 if keeps else element))
        feeds[f"{name}_in"] = x if keeps else x.astype(np.float64)
    nodes.append(helper.make_node(op, names, ["r"], domain="hasten", **attrs))
    nodes.append(helper.make_node("Cast", ["r"], ["y"], to=11))
    graph = helper.make_graph(
        nodes, "g", infos, [helper.make_tensor_value_info("y", 11, [f"y_{a}" for a in range(rank)])]
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("hasten", 1)]
    model = OnnxGraph(helper.make_model(graph, opset_imports=opsets, ir_version=8)).to_model()
    onnx.checker.check_model(model, full_check=True)
    if dtype == "float64" and (op == "UpsampleConv2d" or "gelu" in str(attrs) or "approximate" in attrs):
        # ONNX Runtime has no float64 kernels of Erf and Conv.
        flat = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
        return ReferenceEvaluator(flat).run(None, feeds)[0]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def rounded(array, dtype):
    return np.asarray(array).astype(DTYPES[dtype]).astype(np.float64)


def check(got, wanted, dtype, tolerance=0.0):
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= max(TOLERANCE[dtype], tolerance) * max(1.0, np.abs(wanted).max())


def dtypes_of(opset):
    return [d for d in DTYPES if d != "bfloat16" or opset >= 13]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("act", ["none", "silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_group_norm_act(opset, act):
    for dtype in dtypes_of(opset):
        x, w, b = (rounded(NORMAL.normal(size=s), dtype) for s in ((2, 6, 3, 4), (6,), (6,)))
        grouped = x.reshape(2, 3, -1)
        y = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + EPS)
        y = y.reshape(x.shape) * w[:, None, None] + b[:, None, None]
        got = run("GroupNormAct", {"groups": 3, "eps": EPS, "act": act}, [x, w, b], opset, dtype)
        check(got, activate(y, act), dtype, ERF if act == "gelu" else 0.0)


@pytest.mark.parametrize("present", range(16))
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_group_norm_act_with_and_without_each_operand(present, rank):
    shape = (2, 6, 3, 2, 2)[:rank]
    x = NORMAL.normal(size=shape)
    scale_shape = (2, 6, *(1,) * (rank - 2)) if present % 2 else (2, 6)
    sizes = ((6,), (6,), scale_shape, (1, *scale_shape[1:]))
    w, b, s, t = (NORMAL.normal(size=z) if present >> n & 1 else None for n, z in enumerate(sizes))
    grouped = x.reshape(2, 2, -1)
    y = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 0.1)
    y = y.reshape(2, 6, -1)
    y = y * (1 if w is None else w[:, None]) + (0 if b is None else b[:, None])
    y = y * (1 if s is None else s.reshape(-1, 6, 1)) + (0 if t is None else t.reshape(-1, 6, 1))
    attrs = {"groups": 2, "eps": 0.1, "act": "none"}
    got = run("GroupNormAct", attrs, [x, w, b, s, t], 18, "float32", dynamic=rank == 4)
    check(got, y.reshape(shape), "float32")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_and_gelu(opset, approximate):
    tolerance = ERF if approximate == "none" else 0.0
    for dtype in dtypes_of(opset):
        x = rounded(NORMAL.normal(size=(2, 3, 8)), dtype)
        first, second = x[..., :4], x[..., 4:]
        for gate_first, wanted in ((0, first * gelu(second, approximate)), (1, second * gelu(first, approximate))):
            attrs = {"approximate": approximate, "gate_first": gate_first}
            check(run("Geglu", attrs, [x], opset, dtype, dynamic=True), wanted, dtype, tolerance)
        check(run("Gelu", {"approximate": approximate}, [x], opset, dtype), gelu(x, approximate), dtype, tolerance)


def attention(q, k, v, mask, scale, causal):
    k, v = (np.repeat(t, q.shape[1] // t.shape[1], axis=1) for t in (k, v))
    scores = scale * q @ np.swapaxes(k, -1, -2)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ v


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal", "causal-bool"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["all-heads", "grouped", "one-key-head"])
def test_attention(opset, kind, heads):
    for dtype in dtypes_of(opset):
        q, k, v = (rounded(NORMAL.normal(size=s), dtype) for s in ((2, 4, 5, 8), (2, heads, 7, 8), (2, heads, 7, 6)))
        mask = None
        if "bool" in kind:
            mask = NORMAL.random((2, 1, 5, 7)) > 0.5
            mask[0, 0, 2] = False
        elif kind == "float":
            mask = rounded(NORMAL.normal(size=(4, 5, 7)), dtype)
            mask[1, 3] = -np.inf
        attrs = {"scale": SCALE, "causal": int("causal" in kind)}
        got = run("Attention", attrs, [q, k, v, mask], opset, dtype, dynamic=dtype == "float32")
        check(got, attention(q, k, v, mask, SCALE, "causal" in kind), dtype)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)], ids=["more-keys", "more-queries"])
def test_causal_is_upper_left(shape):
    rows, keys = shape
    q, k, v = (NORMAL.normal(size=s) for s in ((1, 1, rows, 4), (1, 1, keys, 4), (1, 1, keys, 4)))
    got = run("Attention", {"scale": 0.5, "causal": 1}, [q, k, v], 18, "float32")
    check(got, attention(q, k, v, None, 0.5, True), "float32")


def test_a_row_without_keys_is_zero_and_a_nan_input_is_not_hidden():
    q, k, v = (NORMAL.normal(size=(1, 1, 3, 4)) for _ in range(3))
    mask = np.array([[True, True, True], [False, False, False], [True, True, True]])
    q[0, 0, 0, 0] = np.nan
    got = run("Attention", {"scale": 0.5, "causal": 0}, [q, k, v, mask], 18, "float32")
    assert np.isnan(got[0, 0, 0]).all()
    assert (got[0, 0, 1] == 0).all()
    assert np.isfinite(got[0, 0, 2]).all()


def test_half_attention_does_not_overflow():
    q = np.full((1, 1, 2, 64), 60.0)
    v = NORMAL.normal(size=(1, 1, 2, 64))
    got = run("Attention", {"scale": 0.125, "causal": 0}, [q, q, v], 18, "float16")
    check(got, attention(q, q, rounded(v, "float16"), None, 0.125, False), "float16")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_upsample_conv2d(opset, bias):
    for dtype in dtypes_of(opset):
        x, w, b = (rounded(NORMAL.normal(size=s), dtype) for s in ((2, 3, 5, 4), (4, 3, 3, 3), (4,)))
        large = np.pad(x.repeat(2, axis=2).repeat(2, axis=3), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(large, (3, 3), axis=(2, 3))
        wanted = np.einsum("bchwij,kcij->bkhw", windows, w) + (b[:, None, None] if bias else 0)
        got = run("UpsampleConv2d", {}, [x, w, b if bias else None], opset, dtype, dynamic=dtype == "float32")
        check(got, wanted, dtype)


def test_bodies_are_attached_exactly_when_used():
    text = """<ir_version: 8, opset_import: ["" : 18, "hasten" : 1]>
        g (float[2, 8] x) => (float[2, 4] y) { y = hasten.Geglu <approximate = "none", gate_first = 0> (x) }"""
    graph = OnnxGraph(onnx.parser.parse_model(text))
    model = graph.to_model()
    assert [(f.domain, f.name, f.overload) for f in model.functions] == [("hasten", "Geglu", "")]
    assert model.ir_version == 8
    # A body that is no longer needed goes, one that is there already is not doubled.
    assert OnnxGraph(model).to_model() == model
    plain = onnx.parser.parse_model(text.replace('hasten.Geglu <approximate = "none", gate_first = 0>', "Relu"))
    plain.functions.extend(model.functions)
    assert not OnnxGraph(plain).to_model().functions


def test_two_bodies_of_one_operator_are_told_apart_by_overload():
    text = """<ir_version: 8, opset_import: ["" : 18, "hasten" : 1]>
        g (float[2, 8] x, float16[2, 8] h) => (float[2, 4] y, float16[2, 4] z, float[2, 4] t) {
          y = hasten.Geglu <approximate = "none", gate_first = 0> (x)
          z = hasten.Geglu <approximate = "none", gate_first = 0> (h)
          t = hasten.Geglu <approximate = "none", gate_first = 0> (x) }"""
    model = OnnxGraph(onnx.parser.parse_model(text)).to_model()
    assert [n.overload for n in model.graph.node] == ["none_float32", "none_float16", "none_float32"]
    assert model.ir_version == 10
    onnx.checker.check_model(model, full_check=True)
    x = NORMAL.normal(size=(2, 8)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, z, t = session.run(None, {"x": x, "h": x.astype(np.float16)})
    assert (y == t).all()
    assert np.abs(y - z).max() < 5e-3


@pytest.mark.parametrize(
    ("equation", "shapes", "op"),
    [
        ("nhwpqc->nchpwq", [(2, 3, 4, 2, 2, 5)], "Transpose"),
        ("ij -> ji", [(3, 4)], "Transpose"),
        ("iij->ij", [(3, 3, 4)], "Einsum"),
        ("ij->i", [(3, 4)], "Einsum"),
        ("ij,kj->ik", [(3, 4), (5, 4)], "Einsum"),
    ],
)
def test_einsum_that_only_moves_axes_is_a_transposition(equation, shapes, op):
    import torch

    from hasten.passes.fx.to_onnx import onnx_from_graph

    class Product(torch.nn.Module):
        def forward(self, *operands):
            return torch.einsum(equation, *operands)

    given = tuple(torch.from_numpy(NORMAL.standard_normal(s).astype(np.float32)) for s in shapes)
    model = onnx_from_graph(torch.export.export(Product(), given).module(check_guards=False), given, 18)
    assert op in {node.op_type for node in model.graph.node}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
    np.testing.assert_allclose(session.run(None, feeds)[0], Product()(*given).numpy(), rtol=1e-6, atol=1e-6)
