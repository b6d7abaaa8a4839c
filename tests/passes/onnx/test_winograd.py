"""Winograd in standard ONNX operators: equal to Conv, chosen by size, bounded, and left alone where it must be."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import hasten
from hasten.backends.choosing import Choosing
from hasten.passes.onnx import winograd, winograd_form
from hasten.passes.ops.winograd_conv2d.transforms import transform

NAME = "winograd-conv2d"
FORCED = "winograd-conv2d{form=winograd-f4}"


def conv(batch, channels, outputs, height, width, *, bias=True, held=True, dtype=np.float32, **attrs):
    """A model of one 3x3 convolution, by default padded to keep its size."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((outputs, channels, 3, 3)) / (9 * channels) ** 0.5).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x = helper.make_tensor_value_info("x", kind, [batch, channels, height, width])
    y = helper.make_tensor_value_info("y", kind, [batch, outputs, None, None])
    given = [numpy_helper.from_array(rng.standard_normal(outputs).astype(dtype), "bias")] if bias else []
    names = ["x", "weight", *(t.name for t in given)]
    node = helper.make_node("Conv", names, ["y"], "conv", **{"kernel_shape": [3, 3], "pads": [1] * 4, **attrs})
    inputs = [x] if held else [x, helper.make_tensor_value_info("weight", kind, weight.shape)]
    held_tensors = [numpy_helper.from_array(weight, "weight"), *given] if held else given
    graph = helper.make_graph([node], "g", inputs, [y], held_tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model, x):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def kinds(model):
    return [(n.domain, n.op_type) for n in model.graph.node]


def error(model, made, shape):
    """Relative rms error of ``made`` against the convolution in float64."""
    import torch

    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()).double() for t in model.graph.initializer}
    pads = next(a for a in model.graph.node[0].attribute if a.name == "pads").ints
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (pads[1], pads[3], pads[0], pads[2]))
    want = torch.nn.functional.conv2d(padded, held["weight"], held.get("bias")).numpy()
    got = run(made, x)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "pads"),
    [
        ((8, 8), (1, 1, 1, 1)),
        ((7, 9), (1, 1, 1, 1)),
        ((1, 1), (1, 1, 1, 1)),
        ((3, 70), (0, 0, 0, 0)),
        ((12, 5), (0, 2, 1, 0)),
        ((6, 116), (2, 2, 2, 2)),
    ],
)
def test_is_the_convolution(batch, bias, size, pads):
    model = conv(batch, 5, 7, *size, bias=bias, pads=list(pads))
    made, report = hasten.optimize_onnx(model, passes=FORCED)
    assert len(report[NAME].sites) == 1
    assert ("", "Transpose") in kinds(made)
    assert {domain for domain, _ in kinds(made)} == {""}
    assert error(model, made, (batch, 5, *size)) < 1.2e-6


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (2, 1, 2, 1), (0, 1, 0, 1)])
def test_strips_meet(monkeypatch, pads):
    monkeypatch.setattr(winograd_form, "STRIP_BYTES", 4 * 8 * 36 * 5)
    model = conv(1, 8, 8, 23, 20, pads=list(pads))
    made, _ = hasten.optimize_onnx(model, passes=FORCED)
    assert ("", "Concat") in kinds(made)
    assert error(model, made, (1, 8, 23, 20)) < 1.2e-6


def test_the_cut_of_a_large_map():
    assert len(winograd_form.plan(1, 128, 256, 256).strips) >= 3
    assert winograd_form.plan(2, 640, 32, 32).strips == ((0, 8),)
    cut = winograd_form.plan(1, 64, 30, 4 * 29)
    assert (cut.columns, cut.run) == (30, 15)
    assert winograd_form.plan(1, 1 << 20, 64, 64).strips == tuple((i, 1) for i in range(16))


def test_a_batch_that_changes():
    model = conv("B", 8, 8, 8, 8)
    made, report = hasten.optimize_onnx(model, passes=FORCED)
    assert len(report[NAME].sites) == 1
    for batch in (1, 3):
        assert error(model, made, (batch, 8, 8, 8)) < 1.2e-6


@pytest.mark.parametrize("channels", [128, 320, 1280])
def test_the_error_is_the_expected_one(channels):
    """Of the optimised graph as ONNX Runtime runs it, within 20 %."""
    model = conv(1, channels, 64, 16, 16, bias=False)
    made, _ = hasten.optimize_onnx(model, passes=FORCED, verify="structure")
    expected = transform(4, 3).expected_error("float32", channels, winograd.SUMMED)
    assert 0.8 < error(model, made, (1, channels, 16, 16)) / expected < 1.2


def test_large_layers_are_chosen_and_small_ones_are_not():
    made, report = hasten.optimize_onnx(conv(2, 640, 640, 32, 32), verify="structure")
    (choice,) = report.choices
    assert choice["implementation"] == "winograd-f4"
    assert choice["predicted_seconds"] < choice["predicted_direct_seconds"]
    assert choice["weight_bytes"] == 4 * 36 * 640 * 640
    assert any("spread a NaN" in note for note in report.notes)
    again, twice = hasten.optimize_onnx(made, verify="structure")
    assert kinds(again) == kinds(made)
    assert not twice.choices

    same, report = hasten.optimize_onnx(conv(1, 4, 4, 64, 64))
    assert kinds(same) == [("", "Conv")]
    assert report.choices[0]["implementation"] == "direct"


@pytest.mark.parametrize(
    ("choosing", "reason"),
    [
        (Choosing(strict_nan=True), "a NaN or an infinity would spread over its whole tile, and strict-nan was asked"),
        (Choosing(max_error=5e-7), "winograd-f4 is expected to be 1.0e-06 off, 5.0e-07 is allowed"),
        (Choosing(memory_budget=1 << 20), "1.0 MB"),
    ],
)
def test_limits(choosing, reason):
    model = conv(2, 640, 640, 32, 32)
    made, report = hasten.optimize_onnx(model, choosing=choosing)
    assert kinds(made) == [("", "Conv")]
    assert report.choices[0]["implementation"] == "direct"
    if choosing.memory_budget is None:
        assert report.choices[0]["reason"].startswith(reason)
    else:
        assert "memory" in report.choices[0]["reason"]


def test_without_a_budget_weights_grow_by_two_gibibytes_at_most(monkeypatch):
    monkeypatch.setattr(winograd, "GROWTH", 1 << 20)
    made, report = hasten.optimize_onnx(conv(2, 640, 640, 32, 32))
    assert kinds(made) == [("", "Conv")]
    assert "memory" in report.choices[0]["reason"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (conv(1, 64, 64, "H", 32), "the size of its map is not known before the call"),
        (conv(1, 64, 64, 32, 32, held=False), "its weights are not held by the model"),
        (conv(1, 64, 64, 32, 32, dtype=np.float16), "it computes in float16"),
        (conv(1, 64, 64, 32, 32, pads=[3, 0, 0, 0]), "its map is padded by (3, 0, 0, 0)"),
    ],
    ids=["size", "weights", "float16", "padding"],
)
def test_what_is_left_alone_has_a_reason(model, reason):
    made, report = hasten.optimize_onnx(model, passes=FORCED)
    assert kinds(made) == [("", "Conv")]
    (miss,) = report[NAME].misses
    assert miss.reason.startswith(reason)


@pytest.mark.parametrize("attrs", [{"strides": [2, 2]}, {"dilations": [2, 2]}, {"kernel_shape": [3, 3], "group": 1}])
def test_strides_and_dilations_are_the_librarys(attrs):
    _, report = hasten.optimize_onnx(conv(1, 4, 4, 12, 12, **attrs), passes=FORCED)
    assert bool(report[NAME].sites) == ("group" in attrs)
    assert not report[NAME].misses


def test_other_targets_keep_their_convolutions():
    made, report = hasten.optimize_onnx(conv(2, 640, 640, 32, 32), target="tensorrt-rtx:sm89")
    assert kinds(made) == [("", "Conv")]
    assert not report.choices


def test_a_form_that_onnx_does_not_have():
    made, report = hasten.optimize_onnx(conv(2, 640, 640, 32, 32), passes="winograd-conv2d{form=winograd-f6}")
    assert kinds(made) == [("", "Conv")]
    assert report.choices[0]["reason"] == "winograd-f6 was asked for, and ONNX operators have winograd-f4 only"


def test_nan_spreads_over_a_tile_only():
    model = conv(1, 4, 4, 16, 16)
    made, _ = hasten.optimize_onnx(model, passes=FORCED)
    x = np.zeros((1, 4, 16, 16), np.float32)
    x[0, 0, 0, 0] = np.nan
    wrong = np.isnan(run(made, x))
    assert wrong[:, :, :4, :4].all()
    assert not wrong[:, :, 4:].any()
    assert onnx.TensorProto.FLOAT == made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
