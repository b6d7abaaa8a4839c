"""Constants behind convolutions and linear layers, and operators that change nothing; and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import FX_LEVELS, LEVELS, Module, assert_equal, in_float64, rewritten
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from hasten.passes import pipeline
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.onnx.site_check import SiteCheck
from hasten.passes.rule import Report, RuleReport

HELD = ("export", "decomposed")
"""The graphs that hold their weights."""


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, ROWS = noise(2, 4, 6, 5), noise(3, 4)
SCALE, SHIFT = noise(6, 1, 1, seed=5), noise(6, 1, 1, seed=6)


class Behind(nn.Module):
    """A layer, and what stands behind it."""

    def __init__(self, layer: nn.Module, *behind, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.behind = nn.ModuleList(b for b in behind if isinstance(b, nn.Module))
        self.function = next((b for b in behind if not isinstance(b, nn.Module)), None)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        y = self.layer(x)
        for norm in self.behind:
            y = norm(y)
        return y if self.function is None else self.function(y, *(b for b in self._buffers.values()))


def seeded(layer: nn.Module) -> nn.Module:
    for number, value in enumerate(layer.state_dict().values()):
        if value.is_floating_point():
            value.copy_(noise(*value.shape, seed=number + 10))
    return layer


def norm(kind=nn.BatchNorm2d, **options) -> nn.Module:
    made = seeded(kind(6, **options))
    made.running_var.copy_(noise(6, seed=3).square() + 0.1)
    return made


def conv(**options) -> nn.Module:
    return seeded(nn.Conv2d(4, 6, 3, **{"padding": 1, **options}))


def fold(level: str, module: nn.Module, x: torch.Tensor = X):
    return rewritten(level, module, (x,), "fold-conv")


def only_reason(report: RuleReport) -> str:
    assert report.hits == 0
    (miss,) = report.misses
    return miss.reason


FOLDED = {
    "batch norm": (lambda: Behind(conv(), norm()), "batch-norm"),
    "no bias": (lambda: Behind(conv(bias=False), norm()), "batch-norm"),
    "not affine": (lambda: Behind(conv(), norm(affine=False, eps=0.1)), "batch-norm"),
    "groups and strides": (lambda: Behind(conv(groups=2, stride=2, dilation=2), norm()), "batch-norm"),
    "two batch norms": (lambda: Behind(conv(), norm(), norm(eps=0.5)), "batch-norm"),
    "scale": (lambda: Behind(conv(), lambda y: y * 0.3), "scale"),
    "divided": (lambda: Behind(conv(), lambda y: y / 3), "scale"),
    "scale a channel": (lambda: Behind(conv(bias=False), lambda y, s: s * y, s=SCALE), "scale"),
    "shift a channel": (lambda: Behind(conv(), lambda y, t: y + t, t=SHIFT), "shift"),
    "shift without a bias": (lambda: Behind(conv(bias=False), lambda y, t: y - t, t=SHIFT), "shift"),
    "scale and shift": (lambda: Behind(conv(), lambda y, s, t: (y + 2) / s + t, s=SCALE, t=SHIFT), "scale"),
    "all of it": (lambda: Behind(conv(), norm(), lambda y, s: y * s - 1, s=SCALE), "batch-norm"),
}


@pytest.mark.parametrize("level", HELD)
@pytest.mark.parametrize("name", FOLDED)
def test_behind_a_convolution(name: str, level: str) -> None:
    make, variant = FOLDED[name]
    module = make().eval()
    got = fold(level, module)
    assert [s.variant for s in got.report["fold-conv"].sites] == [variant], got.report["fold-conv"].misses
    assert got.ops == {"conv2d": 1}
    assert_equal(got.run(X), in_float64(module, (X,)), 1e-6)
    assert got.again["fold-conv"].hits == 0


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in FX_LEVELS])
@pytest.mark.parametrize("name", FOLDED)
def test_behind_a_convolution_in_exported_files(name: str, level: str) -> None:
    """Exporters fold some of it themselves; nothing is left either way."""
    module = FOLDED[name][0]().eval()
    got = fold(level, module)
    assert got.ops == {"Conv": 1}
    assert_equal(got.run(X), in_float64(module, (X,)), 1e-6)
    assert got.again["fold-conv"].hits == 0


@pytest.mark.parametrize("level", HELD)
def test_other_ranks_and_linear_layers(level: str) -> None:
    layers = {
        "conv1d": (Behind(seeded(nn.Conv1d(4, 6, 3)), norm(nn.BatchNorm1d)), noise(2, 4, 7)),
        "conv3d": (Behind(seeded(nn.Conv3d(4, 6, 2)), norm(nn.BatchNorm3d)), noise(2, 4, 3, 4, 5)),
        "linear": (Behind(seeded(nn.Linear(4, 6)), norm(nn.BatchNorm1d), lambda y: y * 0.5), ROWS),
    }
    for name, (module, x) in layers.items():
        got = fold(level, module.eval(), x)
        assert got.ops == {name: 1}, got.report["fold-conv"].misses
        assert_equal(got.run(x), in_float64(module, (x,)), 1e-6)
        assert got.again["fold-conv"].hits == 0


@pytest.mark.parametrize("level", ["export", "decomposed", "onnx-18", "torchscript", "torchscript-dynamic"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer(bias: bool, level: str) -> None:
    module = Behind(seeded(nn.Linear(4, 6, bias=bias)), lambda y, s: y * s + 1, s=SCALE.flatten()).eval()
    got = fold(level, module, ROWS)
    assert [s.variant for s in got.report["fold-conv"].sites] == ["scale"], got.report["fold-conv"].misses
    assert not {"mul", "Mul"} & got.ops.keys()
    assert_equal(got.run(ROWS), in_float64(module, (ROWS,)), 1e-6)
    assert got.again["fold-conv"].hits == 0


@pytest.mark.parametrize("level", ["export", "onnx-18", "onnx-23", "torchscript"])
def test_linear_layer_on_tokens(level: str) -> None:
    tokens = noise(2, 5, 4)
    module = Behind(seeded(nn.Linear(4, 6)), lambda y: y / 4).eval()
    got = fold(level, module, tokens)
    assert [s.variant for s in got.report["fold-conv"].sites] == ["scale"], got.report["fold-conv"].misses
    assert not {"div", "Div"} & got.ops.keys()
    assert_equal(got.run(tokens), in_float64(module, (tokens,)), 1e-6)
    assert got.again["fold-conv"].hits == 0


@pytest.mark.parametrize("level", HELD)
@pytest.mark.parametrize("transposed", [True, False])
def test_product_with_a_matrix_that_the_graph_holds(transposed: bool, level: str) -> None:
    def function(x, w):
        return (x @ (w.t() if transposed else w) + 1) * 3

    w = noise(6, 4, seed=1) if transposed else noise(4, 6, seed=1)
    module = Module(function, w=w)
    got = fold(level, module, ROWS)
    assert got.report["fold-conv"].count("scale") == 1, got.report["fold-conv"].misses
    assert "mul" not in got.ops
    assert_equal(got.run(ROWS), in_float64(module, (ROWS,)), 1e-6)
    assert got.again["fold-conv"].hits == 0


def test_weight_that_another_layer_reads_is_not_changed() -> None:
    module = Module(lambda x, w: F.conv2d(x, w) * 2 + F.conv2d(x, w), w=noise(6, 4, 3, 3))
    got = fold("export", module)
    assert got.report["fold-conv"].count("scale") == 1
    assert_equal(got.run(X), in_float64(module, (X,)), 1e-6)


# Operators that change nothing

NEUTRAL = {
    "divided": lambda x: torch.tanh(x) / 1.0,
    "times": lambda x: 1 * torch.tanh(x),
    "plus": lambda x: torch.tanh(x) + 0.0,
    "minus": lambda x: torch.tanh(x) - 0,
    "a tensor of ones": lambda x: torch.tanh(x) * torch.ones(5),
}


@pytest.mark.parametrize("level", FX_LEVELS)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_operator(name: str, level: str) -> None:
    module = Module(NEUTRAL[name])
    got = fold(level, module)
    assert [s.variant for s in got.report["fold-conv"].sites] == ["no-op"], got.report["fold-conv"].misses
    assert not {"mul", "div", "truediv", "add", "sub"} & got.ops.keys()
    assert torch.equal(got.run(X), module(X))
    assert got.again["fold-conv"].hits == 0


@pytest.mark.parametrize("level", LEVELS)
def test_resnet_block_with_a_scale_of_one(level: str) -> None:
    """diffusers' ResnetBlock2D divides by ``output_scale_factor``, which is 1 in every published checkpoint."""

    def block(x, w, v):
        h = F.conv2d(F.silu(x), w, padding=1)
        return (x + F.conv2d(F.silu(h), v, padding=1)) / 1.0

    module = Module(block, w=noise(4, 4, 3, 3), v=noise(4, 4, 3, 3, seed=1))
    got = fold(level, module)
    assert not {"div", "truediv", "Div"} & got.ops.keys()
    assert_equal(got.run(X), in_float64(module, (X,)), 1e-6)
    assert got.again["fold-conv"].hits == 0


NOT_NEUTRAL = {
    "nearly one": lambda x: F.silu(x.half()) * 1.001,
    "another shape": lambda x: F.silu(x[:1]) * torch.ones(3, 1, 1, 1),
    "another type": lambda x: F.silu(x) * torch.ones(5, dtype=torch.float64),
    "one minus": lambda x: 0 - F.silu(x),
    "of integers": lambda x: x.long() / 1,
}


@pytest.mark.parametrize("name", NOT_NEUTRAL)
def test_not_neutral(name: str) -> None:
    assert fold("export", Module(NOT_NEUTRAL[name])).report["fold-conv"].hits == 0


def _returned(x):
    y = F.silu(x)
    return y / 1.0, y


def _changed(x):
    y = F.silu(x)
    z = y * 1
    z.add_(1)
    return y + z


def _changed_under_a_view(x):
    y = F.silu(x)
    z = y.view(-1) * 1
    y.add_(1)
    return y.sum() + z


SHARED = {
    "an input": (lambda x: x * 1, "mul may be returned, and would share its memory with args_0"),
    "a view of an input": (lambda x: x.transpose(0, 1) * 1, "mul may be returned, and would share its memory with"),
    "returned twice": (_returned, "div may be returned, and would share its memory with silu"),
    "changed in place": (_changed, "mul is changed in place"),
    "changed under a view": (_changed_under_a_view, "silu is changed in place"),
}


@pytest.mark.parametrize("name", SHARED)
def test_copy_stays_where_its_memory_matters(name: str) -> None:
    function, reason = SHARED[name]
    assert reason in only_reason(fold("export", Module(function)).report["fold-conv"])


# What is left alone


class Training(nn.Module):
    """Statistics of the batch also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(6, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.conv(x))


OUTSIDE = "inputs of the graph: folding them would cost work at every call"
LEFT = {
    "training": (Training, "the BatchNorm is in training mode: its statistics are those of the batch"),
    "read elsewhere": (lambda: Behind(conv(), lambda y: y * 2 + y), "(conv2d) has a user outside the pattern"),
    "a number a pixel": (
        lambda: Behind(conv(), lambda y, s: y * s, s=noise(6, 5)),
        "the constant has shape (6, 5), not one number a channel of (2, 6, 6, 5)",
    ),
    "a number a picture": (
        lambda: Behind(conv(), lambda y, s: y * s, s=noise(2, 1, 1, 1)),
        "the constant has shape (2, 1, 1, 1), not one number a channel of (2, 6, 6, 5)",
    ),
    "zero": (lambda: Behind(conv(), lambda y: y / 0.0), "a folded number is not finite in float32"),
}


@pytest.mark.parametrize("level", ["export", "onnx-18"])
@pytest.mark.parametrize("name", LEFT)
def test_left_alone_because(name: str, level: str) -> None:
    make, reason = LEFT[name]
    if level == "onnx-18":
        reason = reason.replace("conv2d", "Conv")
    if name == "training" and level == "onnx-18":
        pytest.skip("the exporter writes the statistics out")
    assert reason in only_reason(fold(level, make()).report["fold-conv"])


@pytest.mark.parametrize("level", [*HELD, "onnx-18"])
def test_transposed_convolution_keeps_its_batch_norm(level: str) -> None:
    module = Behind(seeded(nn.ConvTranspose2d(4, 6, 3)), lambda y: y * 2)
    assert fold(level, module).report["fold-conv"].hits == 0


def test_batch_norm_of_another_axis() -> None:
    module = Behind(seeded(nn.Linear(4, 6)), norm(nn.BatchNorm1d)).eval()
    reason = only_reason(fold("export", module, noise(2, 6, 4)).report["fold-conv"])
    assert reason == "the BatchNorm is of axis 1, the layer's channels are axis 2"


def test_weights_that_are_inputs_of_the_graph() -> None:
    """torch.compile hands them over at every call."""
    report = fold("dynamo", Behind(conv(), norm())).report["fold-conv"]
    assert only_reason(report) == f"the BatchNorm's weights or statistics are {OUTSIDE}"
    report = fold("dynamo", Behind(conv(), lambda y: y * 2)).report["fold-conv"]
    assert only_reason(report) == f"the weights are {OUTSIDE}"
    report = fold("dynamo", Behind(conv(), lambda y: y + 2)).report["fold-conv"]
    assert only_reason(report) == f"the bias is one of the {OUTSIDE}"


@pytest.mark.parametrize("level", ["dynamo", "export"])
def test_neutral_operator_behind_weights_that_are_inputs(level: str) -> None:
    got = fold(level, Module(lambda x, w: F.silu(F.conv2d(x, w) / 1.0), w=noise(6, 4, 3, 3)))
    assert [s.variant for s in got.report["fold-conv"].sites] == ["no-op"]


HALF = "the weights are float16: folding would round them a second time"


@pytest.mark.parametrize("level", ["export", "onnx-18"])
def test_half_precision_is_folded_where_nothing_is_rounded(level: str) -> None:
    x = X.half()
    assert only_reason(fold(level, Behind(conv(), lambda y: y * 0.3).half(), x).report["fold-conv"]) == HALF
    module = Behind(conv(), lambda y: y / 4).half()
    got = fold(level, module, x)
    assert got.report["fold-conv"].count("scale") == 1
    assert_equal(got.run(x), in_float64(module, (x,)), 1e-3)


def test_bfloat16_is_left_alone() -> None:
    report = fold("export", Behind(conv(), lambda y: y * 2).bfloat16(), X.bfloat16()).report["fold-conv"]
    assert only_reason(report) == HALF.replace("float16", "bfloat16")


def test_buffer_that_the_graph_changes_is_no_constant() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()
            self.register_buffer("scale", SCALE.clone())

        def forward(self, x):
            self.scale.add_(1)
            return self.conv(x) * self.scale

    assert fold("export", Counting()).report["fold-conv"].hits == 0


# BatchNormalization as written in a file


def file(outputs: int = 1, inputs: tuple[str, ...] = (), channels: int = 6, **attributes) -> onnx.ModelProto:
    """Conv, then BatchNormalization; ``inputs`` names the statistics that come from outside."""
    vectors = {"scale": noise(channels, seed=1), "b": noise(channels, seed=2), "mean": noise(channels, seed=3)}
    vectors["var"] = noise(channels, seed=4).square() + 0.1
    held = {"w": noise(channels, 4, 3, 3), **{k: v for k, v in vectors.items() if k not in inputs}}
    names = ["z", "running_mean", "running_var"][:outputs]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 0, 1]),
            helper.make_node("BatchNormalization", ["y", *vectors], names, **attributes),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, "h", 5])]
        + [helper.make_tensor_value_info(k, TensorProto.FLOAT, [channels]) for k in inputs],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", channels, "k", 5])],
        [numpy_helper.from_array(v.numpy(), k) for k, v in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run_file(model: onnx.ModelProto) -> tuple[OnnxGraph, Report]:
    graph = OnnxGraph(model)
    steps = pipeline.parse("fold-conv")
    return graph, pipeline.run(graph, steps, pipeline.Context(verify=SiteCheck()), Report())


@pytest.mark.parametrize("channels", [6, 512], ids=["small", "as large as weights that checks draw at random"])
def test_batch_normalization(channels: int) -> None:
    model = file(epsilon=0.01, channels=channels)
    graph, report = run_file(model)
    assert report["fold-conv"].count("batch-norm") == 1
    assert report.ops_after == {"Conv": 1}
    assert report.reverted == []
    models = [m.SerializeToString() for m in (model, graph.to_model())]
    want, got = (
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, {"x": X.numpy()})[0]
        for m in models
    )
    assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()
    assert run_file(graph.to_model())[1]["fold-conv"].hits == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"training_mode": 1, "outputs": 3},
            "the BatchNorm is in training mode: its statistics are those of the batch",
        ),
        ({"inputs": ("mean", "var")}, f"the BatchNorm's weights or statistics are {OUTSIDE}"),
    ],
)
def test_batch_normalization_left_alone_because(options, reason: str) -> None:
    assert only_reason(run_file(file(**options))[1]["fold-conv"]) == reason
