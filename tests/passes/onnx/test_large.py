"""A model above protobuf's 2 GB: read, inferred, rewritten, checked, written, read again."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hasten.backends.optimize import optimize_onnx
from hasten.passes.onnx import io


def large_model(width=16384, weights=2):
    """GEGLUs between linear layers of ``width`` x 2 ``width`` in float16: 1 GB each."""
    nodes, initializers = [], []
    for i in range(weights):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT16, dims=[width, 2 * width])
        tensor.raw_data = np.full((width, 2 * width), 1 / width, dtype=np.float16).tobytes()
        initializers.append(tensor)
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"l{i}"]),
            helper.make_node("Split", [f"l{i}"], [f"a{i}", f"b{i}"], axis=-1, num_outputs=2),
            helper.make_node("Gelu", [f"b{i}"], [f"g{i}"]),
            helper.make_node("Mul", [f"a{i}", f"g{i}"], [f"x{i + 1}"]),
        ]
    info = helper.make_tensor_value_info("x0", TensorProto.FLOAT16, ["N", width])
    output = helper.make_tensor_value_info(f"x{weights}", TensorProto.FLOAT16, ["N", width])
    graph = helper.make_graph(nodes, "g", [info], [output], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.slow
def test_above_two_gigabytes(tmp_path):
    files = io.write(large_model(), tmp_path / "large.onnx")
    assert [f.name for f in files] == ["large.onnx", "large.onnx.data"]
    assert files[1].stat().st_size >= 1 << 31
    model, report = optimize_onnx(files[0], target="tensorrt:sm90", expect={"geglu": 2})
    assert report.ops_after == {"Gelu": 2, "MatMul": 2, "Mul": 2, "Split": 2}
    for file in files:
        file.unlink()
    (path, _) = io.write(model, tmp_path / "out.onnx")
    del model
    onnx.checker.check_model(str(path), full_check=True)


def test_the_same_on_a_small_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "INLINE_LIMIT", 1000)
    files = io.write(large_model(width=32), tmp_path / "small.onnx")
    assert len(files) == 2
    model, _ = optimize_onnx(files[0], target="onnxruntime:cpu", expect={"geglu": 2})
    io.write(model, tmp_path / "out.onnx")
    assert io.read(tmp_path / "out.onnx").model == model
