"""The way through torch_tensorrt, which is played by a module of that name."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from hasten.backends import torch_tensorrt
from hasten.backends.build import build
from hasten.errors import HastenError, MissingPackageError


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def compiler(monkeypatch):
    """Records how it is called, and saves a file."""
    calls = SimpleNamespace(compile=None, save=None)

    def compile(program, inputs, **settings):  # noqa: A001
        calls.compile = (type(program).__name__, inputs, settings)
        return "compiled"

    def save(module, path, **options):
        calls.save = (module, Path(path).name, options)
        Path(path).write_bytes(b"package")

    module = ModuleType("torch_tensorrt")
    module.__version__ = "2.13.0"
    module.save = save
    module.dynamo = SimpleNamespace(compile=compile)
    module.calls = calls
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    return module


def test_compiles_and_saves_a_package_without_pickles(compiler, tmp_path):
    x = torch.ones(2, 4)
    graph = torch.fx.symbolic_trace(Linear().eval())
    assert torch_tensorrt.package(graph, [x], None, tmp_path) == ["model.pt2"]
    name, inputs, settings = compiler.calls.compile
    assert (name, inputs) == ("ExportedProgram", [x])
    assert settings == {"use_explicit_typing": True, "immutable_weights": True, "attn_bias_is_causal": False}
    assert compiler.calls.save == (
        "compiled",
        "model.pt2",
        {"output_format": "aot_inductor", "retrace": True, "arg_inputs": [x]},
    )
    assert (tmp_path / "model.pt2").read_bytes() == b"package"
    assert torch_tensorrt.runtime_versions() == {"torch": torch.__version__, "torch-tensorrt": "2.13.0"}


def test_settings_that_an_older_version_lacks_are_left_out(compiler, tmp_path):
    compiler.dynamo.CompilationSettings = SimpleNamespace(__dataclass_fields__={"immutable_weights": None})
    torch_tensorrt.package(torch.fx.symbolic_trace(Linear()), [torch.ones(2, 4)], None, tmp_path)
    assert compiler.calls.compile[2] == {"immutable_weights": True}


def test_names_the_conditional_that_it_cannot_convert():
    class Branch(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    graph = torch.export.export(Branch(), (torch.ones(2),)).module(check_guards=False)
    with pytest.raises(HastenError) as caught:
        torch_tensorrt.refuse_control_flow(graph)
    assert str(caught.value) == (
        "target torch-tensorrt: node 'cond' is a torch.cond, which torch_tensorrt has no converter for; build "
        "tensorrt or tensorrt-rtx instead"
    )


def test_needs_a_gpu(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(HastenError) as caught:
        torch_tensorrt.package(torch.fx.symbolic_trace(Linear()), [torch.ones(2, 4)], None, tmp_path)
    assert str(caught.value) == (
        "target torch-tensorrt compiles for the GPU at hand, and torch finds none here; build it on one"
    )


def test_message_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingPackageError) as caught:
        build(Linear(), target="torch-tensorrt", out=tmp_path / "linear", example_inputs=(torch.ones(2, 4),))
    assert str(caught.value) == "torch_tensorrt is not installed: pip install 'hasten[torch-tensorrt]'"
    assert caught.value.exit_code == 4
    assert not (tmp_path / "linear").exists()
