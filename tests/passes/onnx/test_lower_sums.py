"""Sums that step caches write: what ONNX Runtime gets for them on a CPU, that it computes the same, and what stays."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

from hasten.backends.optimize import optimize_onnx

RNG = np.random.default_rng(0)
PLACES = ", ".join(f"int64 p{i} = {{{i}}}" for i in range(3))
STORED = {"stored": RNG.normal(size=(3, 2, 5)).astype(np.float32), "weights": np.float32([0.5, -2, 3])}


def model_of(body, given, made, constants=""):
    return parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g ({given}) => ({made}) <{constants}> {{{body}}}'
    )


def lowered(model, target="onnxruntime:cpu"):
    made, report = optimize_onnx(model, target=target, passes="legalise")
    onnx.checker.check_model(made, full_check=True)
    return made, sorted(k for k in report.ops_after if k != "Constant")


def same(before, after, feeds):
    a, b = (ort.InferenceSession(m.SerializeToString()).run(None, feeds)[0] for m in (before, after))
    assert a.shape == b.shape
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def slices(order=(0, 1, 2), weights="weights", taken="stored"):
    words = [f"s{i} = Gather ({taken}, p{i}) w{i} = Gather ({weights}, p{i}) m{i} = Mul (w{i}, s{i})" for i in order]
    a, b, c = order
    return f"{' '.join(words)} t = Add (m{a}, m{b}) y = Add (t, m{c})"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_slices_times_numbers_are_one_product(order):
    model = model_of(slices(order), "float[3,2,5] stored, float[3] weights", "float[2,5] y", PLACES)
    made, ops = lowered(model)
    assert ops == ["MatMul", "Reshape"]  # the weights are taken as they lie
    same(model, made, STORED)


def test_numbers_from_elsewhere_are_put_together():
    body = "a = Gather (stored, p0) b = Gather (stored, p1) u = Mul (a, v) w = Mul (x, b) y = Add (u, w)"
    model = model_of(body, "float[2,2,5] stored, float v, float x", "float[2,5] y", PLACES)
    made, ops = lowered(model)
    assert ops == ["Concat", "MatMul", "Reshape", "Unsqueeze"]
    same(model, made, {"stored": STORED["stored"][:2], "v": np.array(2, np.float32), "x": np.array(-0.25, np.float32)})


@pytest.mark.parametrize(
    ("given", "body"),
    [
        ("float[4,2,5] stored, float[3] weights", slices()),  # not all of it
        ("float[3,2,5] stored, float[3,5] weights", slices()),  # weights that are no numbers
        ("float[3,2,5] stored, float[3] weights, float[2,5] x", f"{slices()[:-15]}y = Add (t, x)"),  # something else
        ("float[3,2,5] stored, float[3] weights", f"{slices()[:-15]}t2 = Mul (t, t) y = Add (t2, m2)"),
        ("double[3,2,5] stored, double[3] weights", slices()),
    ],
)
def test_other_sums_stay(given, body):
    kind = "double" if "double" in given else "float"
    ops = lowered(model_of(body, given, f"{kind}[2,5] y", PLACES))[1]
    assert set(ops).isdisjoint({"Einsum", "MatMul"})
    assert "Add" in ops


def columns(order=(0, 1, 2), beside=" y = Add (t, m{c})"):
    term = "s{i} = Gather (stored, p{i}) g{i} = Gather <axis = 1> (matrix, p{i}) w{i} = Reshape (g{i}, column)"
    words = [term.format(i=i) + f" m{i} = Mul (w{i}, s{i})" for i in order]
    a, b, c = order
    return f"{' '.join(words)} t = Add (m{a}, m{b}){beside.format(c=c)}"


COLUMN = f"{PLACES}, int64[3] column = {{-1, 1, 1}}"
MATRIX = RNG.normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize(
    ("beside", "ops"),
    [
        (" y = Add (t, m{c})", ["MatMul", "Reshape"]),
        (" u = Add (x, t) y = Add (u, m{c})", ["Add", "MatMul", "Reshape"]),
        (" o = Mul (x, x) u = Add (t, o) v = Add (m{c}, u) y = Add (v, x)", ["Add", "MatMul", "Mul", "Reshape"]),
    ],
)
def test_slices_times_columns_are_one_product_and_what_is_beside_them_is_added(order, beside, ops):
    given = "float[3,2,5] stored, float[4,3] matrix, float[4,2,5] x"
    model = model_of(columns(order, beside=beside), given, "float[4,2,5] y", COLUMN)
    made, found = lowered(model)
    assert found == ops
    feeds = {"stored": STORED["stored"], "matrix": MATRIX, "x": RNG.normal(size=(4, 2, 5)).astype(np.float32)}
    same(model, made, {k: v for k, v in feeds.items() if k in {i.name for i in made.graph.input}})


@pytest.mark.parametrize(
    ("given", "body"),
    [
        ("float[4,2,5] stored, float[4,3] matrix", columns()),  # not all slices
        ("float[3,2,5] stored, float[4,4] matrix", columns()),  # not all columns
        ("float[3,2,5] stored, float[4,3] matrix", columns().replace("p2", "p1")),  # one twice
        ("float[3,2,5] stored, float[4,3] matrix", columns().replace("(matrix, p0)", "(matrix, p1)")),  # crossed
        ("double[3,2,5] stored, double[4,3] matrix", columns()),
    ],
)
def test_other_sums_of_columns_stay(given, body):
    kind = "double" if "double" in given else "float"
    ops = lowered(model_of(body, given, f"{kind}[4,2,5] y", COLUMN))[1]
    assert set(ops).isdisjoint({"Einsum", "MatMul"})


@pytest.mark.parametrize(
    ("sizes", "ops"), [("n,5", ["MatMul", "Reshape"]), ("2,n", ["MatMul", "Reshape"]), ("n,m", ["Einsum"])]
)
def test_sizes_that_are_not_known(sizes, ops):
    vector = model_of(slices(), f"float[3,{sizes}] stored, float[3] weights", f"float[{sizes}] y", PLACES)
    matrix = model_of(columns(), f"float[3,{sizes}] stored, float[4,3] matrix", f"float[4,{sizes}] y", COLUMN)
    for model, feeds in ((vector, STORED), (matrix, {"stored": STORED["stored"], "matrix": MATRIX})):
        made, found = lowered(model)
        assert found == ops
        same(model, made, feeds)


def test_other_targets_keep_their_sums():
    model = model_of(slices(), "float[3,2,5] stored, float[3] weights", "float[2,5] y", PLACES)
    ops = lowered(model, "tensorrt-rtx:sm89")[1]
    assert set(ops).isdisjoint({"Einsum", "MatMul"})  # where a product may be computed in TF32


@pytest.mark.parametrize("keep", [0, 1])
def test_the_mean_of_absolute_values_reads_once(keep):
    body = f"a = Abs (x) y = ReduceMean <keepdims = {keep}> (a)"
    model = model_of(body, "float[2,3,5] x", "float[1,1,1] y" if keep else "float y")
    made, ops = lowered(model)
    assert ops == ["Div", "ReduceL1"]
    same(model, made, {"x": RNG.normal(size=(2, 3, 5)).astype(np.float32)})


@pytest.mark.parametrize(
    "body",
    [
        "a = Abs (x) y = ReduceMean <keepdims = 0> (a, axes)",
        "a = Neg (x) y = ReduceMean <keepdims = 0> (a)",
        "y = ReduceMean <keepdims = 0> (x)",
    ],
)
def test_other_means_stay(body):
    model = model_of(body, "float[2,3,5] x", "float[3,5] y" if "axes" in body else "float y", "int64[1] axes = {0}")
    assert "ReduceMean" in lowered(model)[1]


def test_a_mean_over_a_size_that_is_not_known_stays():
    model = model_of("a = Abs (x) y = ReduceMean <keepdims = 0> (a)", "float[n,3,5] x", "float y")
    assert "ReduceMean" in lowered(model)[1]
