"""The command line in this process, and small sources for it: everything slow is made once."""

import json
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hasten.tools.cli import main


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def hasten(capsys, monkeypatch):
    """Run one command line; everything on stdout and stderr is caught. No progress, however slow the machine is."""
    monkeypatch.setattr("hasten.tools.console.PATIENCE", 1e6)

    def call(*words):
        capsys.readouterr()
        code = main([str(w) for w in words])
        caught = capsys.readouterr()
        return Done(code, caught.out, caught.err)

    return call


def _tiny_onnx(*, second_output=False):
    """GroupNorm, SiLU, convolution: (B, 32, 8, 8) -> (B, 32, 8, 8). ``second_output``: the sigmoid is given as well."""
    rng = np.random.default_rng(0)

    def weight(name, *shape):
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.1, name)

    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["n"], "norm", num_groups=4, epsilon=1e-5),
        helper.make_node("Sigmoid", ["n"], ["s"], "sigmoid"),
        helper.make_node("Mul", ["n", "s"], ["a"], "mul"),
        helper.make_node("Conv", ["a", "kernel"], ["y"], "conv", pads=[1, 1, 1, 1]),
    ]

    def picture(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 32, 8, 8])

    outputs = [picture("y"), *([picture("s")] if second_output else [])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [picture("x")],
        outputs,
        [weight("scale", 32), weight("bias", 32), weight("kernel", 32, 32, 3, 3)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="session")
def tiny_onnx():
    """Build the model."""
    return _tiny_onnx


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(_tiny_onnx(), path)
    return path


class Tiny(nn.Module):
    """conv, GroupNorm, SiLU, attention: (B, 4, 8, 8) -> (B, 64, 32)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.qkv = nn.Linear(32, 96)

    def forward(self, sample):
        hidden = F.silu(self.norm(self.conv(sample)))
        q, k, v = (
            t.unflatten(-1, (2, 16)).transpose(1, 2)
            for t in self.qkv(hidden.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="session")
def pt2_file(tmp_path_factory):
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=8)
    module = Tiny().eval().requires_grad_(False)
    program = torch.export.export(module, (torch.randn(2, 4, 8, 8),), dynamic_shapes={"sample": {0: batch}})
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="session")
def engine(onnx_file, tmp_path_factory):
    """An ONNX Runtime engine of `onnx_file`."""
    out = tmp_path_factory.mktemp("engines") / "tiny"
    assert main(["build", str(onnx_file), "-o", str(out), "-q"]) == 0
    return out
