"""A choice between two large tensors is a branch in ONNX Runtime's models, and chooses the same."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

from hasten.passes.onnx import where_branch

RNG = np.random.default_rng(0)
LARGE = (4, 64, 64)


def model_of(body, given, made):
    text = f'<ir_version: 9, opset_import: ["" : 20]> g ({given}) => ({made}) {{{body}}}'
    return onnx.shape_inference.infer_shapes(parser.parse_model(text))


def run(model, feeds):
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


@pytest.mark.parametrize("first", ["4,64,64", "1,64,64"])
@pytest.mark.parametrize("chosen", [True, False])
def test_the_branch_gives_what_where_gives(first, chosen):
    model = model_of("y = Where (c, a, b)", f"bool c, float[{first}] a, float[4,64,64] b", "float[4,64,64] y")
    sizes = [int(size) for size in first.split(",")]
    feeds = {"c": np.array(chosen), "a": RNG.normal(size=sizes), "b": RNG.normal(size=LARGE)}
    feeds = {k: v if k == "c" else v.astype(np.float32) for k, v in feeds.items()}
    before = run(model, feeds)
    assert where_branch.run(model) == 1
    assert [n.op_type for n in model.graph.node] == ["If"]
    assert np.array_equal(run(model, feeds), before)


def test_inside_a_branch_too():
    text = """y = If (c) <
      then_branch = t () => (float[4,64,64] z) {z = Where (d, a, b)},
      else_branch = e () => (float[4,64,64] w) {w = Identity (a)}>"""
    given = "bool c, bool d, float[4,64,64] a, float[4,64,64] b"
    model = model_of(text, given, "float[4,64,64] y")
    a, b = (RNG.normal(size=LARGE).astype(np.float32) for _ in range(2))
    assert where_branch.run(model) == 1
    for c, d, wanted in ((True, True, a), (True, False, b), (False, False, a)):
        assert np.array_equal(run(model, {"c": np.array(c), "d": np.array(d), "a": a, "b": b}), wanted)


@pytest.mark.parametrize(
    ("condition", "size"),
    [("bool", "4,8"), ("bool[4,64,64]", "4,64,64"), ("bool[1]", "4,64,64"), ("bool", "n,64,64")],
)
def test_others_stay(condition, size):
    """Small tensors, conditions of elements, and sizes that only a call tells."""
    model = model_of("y = Where (c, a, b)", f"{condition} c, float[{size}] a, float[{size}] b", f"float[{size}] y")
    assert where_branch.run(model) == 0
    assert [n.op_type for n in model.graph.node] == ["Where"]
