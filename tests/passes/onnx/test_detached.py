"""Weights in a file beside a model in memory: passes leave them there, and read them where they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from torch import nn

from hasten.backends.optimize import optimize_onnx
from hasten.errors import UsageError
from hasten.passes.fx.to_onnx import onnx_from_graph
from hasten.passes.onnx import io
from hasten.passes.onnx.detached import FROM, WeightsFile
from hasten.passes.onnx.graph import OnnxGraph


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Linear(128, 160), nn.Linear(160, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(torch.relu(self.large(x)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def written(request: Any, tmp_path_factory: Any) -> tuple[onnx.ModelProto, onnx.ModelProto, Path]:
    """The model with its weights in a file, the one that holds them, and the file."""
    dtype = getattr(torch, request.param)
    graph = torch.export.export(Layers().to(dtype).eval(), (torch.ones(2, 128, dtype=dtype),)).module(
        check_guards=False
    )
    file = tmp_path_factory.mktemp("written") / "model.weights"
    given = [torch.ones(2, 128, dtype=dtype)]
    with WeightsFile(file) as weights:
        model = onnx_from_graph(graph, given, 22, weights=weights)
    return model, onnx_from_graph(graph, given, 22), file


@pytest.fixture
def exported(written: Any) -> tuple[onnx.ModelProto, onnx.ModelProto, Path]:
    """The same, to be changed."""
    copies = [onnx.ModelProto() for _ in range(2)]
    for copy, model in zip(copies, written, strict=False):
        copy.CopyFrom(model)
    return copies[0], copies[1], written[2]


def outside(model: onnx.ModelProto) -> list[str]:
    return [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def test_only_large_weights_go_to_the_file(exported: Any) -> None:
    model, whole, file = exported
    (name,) = outside(model)
    (held,) = (t for t in whole.graph.initializer if t.name == name)
    assert np.prod(held.dims) >= FROM
    assert file.read_bytes() == held.raw_data
    assert len(model.SerializeToString()) < len(whole.SerializeToString()) - len(held.raw_data) + 1000
    assert io.weight_bytes(model) == io.weight_bytes(whole)


def test_a_file_that_cannot_be_written_is_said_at_the_end(tmp_path: Path) -> None:
    graph = torch.export.export(Layers().eval(), (torch.ones(2, 128),)).module(check_guards=False)
    with pytest.raises(FileNotFoundError, match="missing"), WeightsFile(tmp_path / "missing" / "w") as weights:
        onnx_from_graph(graph, [torch.ones(2, 128)], 22, weights=weights)


def test_what_went_wrong_first_is_what_is_said(tmp_path: Path) -> None:
    graph = torch.export.export(Layers().eval(), (torch.ones(2, 128),)).module(check_guards=False)
    weights = WeightsFile(tmp_path / "missing" / "w")

    def body() -> None:
        with weights:
            onnx_from_graph(graph, [torch.ones(2, 128)], 22, weights=weights)
            raise KeyError("the body")

    with pytest.raises(KeyError, match="the body"):
        body()


def test_passes_leave_them_there_and_the_file_that_is_written_finds_them(exported: Any) -> None:
    model, whole, file = exported
    before = outside(model)
    rewritten, _ = optimize_onnx(model, target="tensorrt-rtx:sm89", passes="legalise", weights=file.parent)
    assert outside(rewritten) == before
    path = file.with_name("model.onnx")
    assert io.write(rewritten, path) == [path]
    assert outside(rewritten) == before
    read = {t.name: t for t in io.read(path).model.graph.initializer}
    for tensor in whole.graph.initializer:
        assert read[tensor.name].raw_data == tensor.raw_data
    if whole.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        x = np.random.default_rng(0).normal(size=(2, 128)).astype("f")
        found, wanted = (
            ort.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, {whole.graph.input[0].name: x})[0]
            for m in (str(path), whole.SerializeToString())
        )
        np.testing.assert_array_equal(found, wanted)


def test_a_pass_that_looks_reads_them(exported: Any) -> None:
    model, whole, file = exported
    graph = OnnxGraph(model, file.parent)
    tensors = graph.main.graph.tensors()
    for name in outside(model):
        assert isinstance(tensors[name], gs.Constant)
        (held,) = (t for t in whole.graph.initializer if t.name == name)
        np.testing.assert_array_equal(tensors[name].values, onnx.numpy_helper.to_array(held))


def test_what_was_looked_at_stays_in_the_file(exported: Any) -> None:
    model, whole, file = exported
    graph = OnnxGraph(model, file.parent)
    (view,) = graph.views()
    (name,) = outside(model)
    (held,) = (t for t in whole.graph.initializer if t.name == name)
    np.testing.assert_array_equal(view.constant(name), onnx.numpy_helper.to_array(held))
    assert outside(graph.to_model()) == [name]


def test_a_model_in_memory_with_weights_elsewhere_needs_their_folder(exported: Any) -> None:
    model, _, file = exported
    with pytest.raises(
        UsageError, match=f"is in the external file '{file.name}', and a proto has no folder to look in"
    ):
        optimize_onnx(model, target="tensorrt-rtx:sm89")
