"""From sources to engines that agree with the module."""

import copy
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hasten.backends import inductor
from hasten.backends.build import build
from hasten.backends.engine import load
from hasten.errors import HastenError, MissingPackageError, UsageError

TOLERANCE = 2e-5


def agree(engine, module, *inputs):
    """Run both on the same inputs, torch and numpy, and compare every output."""
    named = dict(zip(("sample", "timestep"), inputs, strict=True))
    with torch.no_grad():
        expected = module(*inputs)
    found = engine(**named)
    assert list(found) == list(expected)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=TOLERANCE, atol=TOLERANCE)
    as_numpy = engine(**{k: v.numpy() for k, v in named.items()})
    for name, want in found.items():
        np.testing.assert_allclose(as_numpy[name], want.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def sizes(batch, size):
    return torch.randn(batch, 4, size, 16), torch.rand(batch)


def test_aoti_engine_agrees_with_the_module_at_every_size(aoti_engine, tiny, examples):
    agree(aoti_engine, tiny, *examples)
    for batch, size in ((1, 16), (8, 8), (3, 32)):
        agree(aoti_engine, tiny, *sizes(batch, size))


def test_aoti_engine_is_right_for_inputs_in_another_memory_order(aoti_engine, tiny, examples):
    agree(aoti_engine, tiny, examples[0].to(memory_format=torch.channels_last), examples[1])
    agree(aoti_engine, tiny, examples[0].transpose(2, 3).contiguous().transpose(2, 3), examples[1])


def test_aoti_engine_refuses_sizes_out_of_range(aoti_engine):
    with pytest.raises(UsageError, match=r"input 'sample': dimension 0 \(batch\) is 9, expected 1 to 8$"):
        aoti_engine(sample=torch.ones(9, 4, 16, 16), timestep=torch.ones(9))
    with pytest.raises(UsageError, match=r"input 'sample': dimension 2 \(size\) is 33, expected 8 to 32$"):
        aoti_engine(sample=torch.ones(2, 4, 33, 16), timestep=torch.ones(2))


def test_message_for_a_graph_that_is_not_dynamic(tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, 8)

    auto = torch.export.Dim.AUTO
    with pytest.raises(HastenError) as caught:
        inductor.package(torch.fx.symbolic_trace(Fixed()), [torch.ones(2, 8)], ({0: auto},), "cpu", tmp_path)
    assert str(caught.value) == (
        "dimension 0 of input 'x' shall be dynamic, and the graph holds for 2 only; make it fixed, or find the "
        "pass that fixed it with --skip"
    )


def test_manifest_of_an_aoti_engine(aoti_engine):
    manifest = aoti_engine.manifest
    assert [(t.name, t.dtype, t.shape) for t in aoti_engine.inputs] == [
        ("sample", "float32", ("batch", 4, "size", 16)),
        ("timestep", "float32", ("batch",)),
    ]
    assert [(t.name, t.shape) for t in aoti_engine.outputs] == [
        ("sample", ("batch", "16*size", 64)),
        ("hidden", ("batch", 64, "size", 16)),
    ]
    assert manifest.dims == {"batch": (1, 8), "size": (8, 32)}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.report["target"] == "aoti:cpu"
    seconds = manifest.report["seconds"]
    assert manifest.seconds == pytest.approx(sum(seconds[s] for s in ("capture", "optimize", "compile")))
    assert sorted(p.name for p in aoti_engine.path.iterdir()) == ["hasten_native.so", "manifest.json", "model.pt2"]


def test_an_engine_runs_in_another_process_and_from_another_place(aoti_engine, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in aoti_engine.path.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    code = (
        "import sys, torch; from hasten.backends.engine import load; "
        "print(load(sys.argv[1])(sample=torch.ones(1, 4, 8, 16), timestep=torch.ones(1))['sample'].sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(moved)], check=True, capture_output=True, text=True)
    here = aoti_engine(sample=torch.ones(1, 4, 8, 16), timestep=torch.ones(1))["sample"].sum().item()
    assert float(run.stdout) == pytest.approx(here, rel=1e-6)


@pytest.mark.parametrize(
    ("version", "value", "message"),
    [
        ("torch", "1.9.0", "built with torch 1.9.0, and this is torch {torch}: build it again"),
        (
            "cpu",
            "avx2 avx512_f fma3",
            "compiled for a CPU with avx512_f, which this one lacks: build it on this machine",
        ),
    ],
)
def test_refuses_a_package_of_another_torch_or_cpu(aoti_engine, tmp_path, monkeypatch, version, value, message):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "fma3": True, "avx512_f": False})
    other = tmp_path / "other"
    other.mkdir()
    for file in aoti_engine.path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "manifest.json").read_text())
    content["versions"] |= {"cpu": "avx2", version: value}
    (other / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(HastenError) as caught:
        load(other)
    assert str(caught.value) == f"engine '{other}': {message.format(torch=torch.__version__)}"


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_onnxruntime_engine_agrees_with_the_module(tiny, examples, dynamic_shapes, tmp_path, dynamic):
    engine = build(
        tiny,
        target="onnxruntime:cpu",
        out=tmp_path / "tiny",
        example_inputs=examples,
        dynamic_shapes=dynamic_shapes if dynamic else None,
    )
    agree(engine, tiny, *examples)
    if dynamic:
        agree(engine, tiny, *sizes(1, 8))
        agree(engine, tiny, *sizes(8, 32))
    agree(load(engine.path, threads=1), tiny, *examples)
    assert sorted(p.name for p in engine.path.iterdir()) == ["manifest.json", "model.onnx"]
    assert engine.report["ir"] == "fx"


def test_frozen_arguments_are_in_the_manifest(tiny, examples, tmp_path):
    engine = build(
        tiny,
        target="onnxruntime:cpu",
        out=tmp_path / "tiny",
        example_inputs=examples,
        example_kwargs={"scale": 3.0, "return_dict": False},
    )
    assert engine.manifest.constants == {"scale": 3.0, "return_dict": False}
    assert [t.name for t in engine.outputs] == ["output_0", "output_1"]
    with torch.no_grad():
        want = tiny(*examples, scale=3.0, return_dict=False)[0]
    found = engine(sample=examples[0], timestep=examples[1], scale=3.0)["output_0"]
    torch.testing.assert_close(found, want, rtol=TOLERANCE, atol=TOLERANCE)


def test_dtype_converts_a_copy_of_the_module(tiny, examples, tmp_path):
    engine = build(tiny, target="onnxruntime:cpu", out=tmp_path / "tiny", example_inputs=examples, dtype="float16")
    assert {t.dtype for t in engine.inputs + engine.outputs} == {"float16"}
    assert next(tiny.parameters()).dtype == torch.float32
    with torch.no_grad():
        want = tiny(*examples)["sample"]
    found = engine(sample=examples[0].half(), timestep=examples[1].half())["sample"].float()
    assert float((found - want).abs().max()) < 5e-3 * float(want.abs().max())


def test_nested_arguments_and_unused_ones(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, a, unused, *, extra, flag=True):
            return {"difference": extra["p"] - extra["q"]["r"], "same": a, "number": 3, "none": None}

    x = torch.ones(2, 3)
    engine = build(
        Model(),
        target="onnxruntime:cpu",
        out=tmp_path / "nested",
        example_inputs=(x,),
        example_kwargs={"extra": {"p": x, "q": {"r": x}}, "unused": torch.tensor([1])},
    )
    assert sorted(t.name for t in engine.inputs) == ["a", "extra_p", "extra_q_r", "unused"]
    out = engine(a=x, extra_p=5 * x, extra_q_r=2 * x, unused=torch.tensor([2]))
    assert list(out) == ["difference", "same"]
    assert torch.equal(out["difference"], 3 * x)
    assert torch.equal(out["same"], x)


class Registered:
    """What a registered model's adapter tells."""

    name = "tiny-unet"
    output_names = ("sample", "hidden")

    def __init__(self, module, examples):
        self._module, self._examples = module, examples

    def module(self, dtype):
        return copy.deepcopy(self._module).to(dtype)

    def example_inputs(self, dtype):
        return {k: v.to(dtype) for k, v in zip(("sample", "timestep"), self._examples, strict=True)}


def test_names_are_looked_up_in_the_registry(tiny, examples, tmp_path, monkeypatch):
    asked = []

    def get(name, weights):
        asked.append((name, weights))
        return Registered(tiny, examples)

    monkeypatch.setattr("hasten.models.registry.get", get)
    agree(build("tiny-unet", target="onnxruntime:cpu", out=tmp_path / "a"), tiny, *examples)
    half = build("tiny-unet", target="onnxruntime:cpu", out=tmp_path / "b", dtype="float16", weights="folder")
    assert {t.dtype for t in half.inputs} == {"float16"}
    assert asked == [("tiny-unet", None), ("tiny-unet", "folder")]
    assert half.report["source"] == "tiny-unet"
    assert half.report["rules"]


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path):
    assert message(UsageError, 2, "scenes-unte", target="onnxruntime:cpu", out=tmp_path / "e").endswith(
        " Did you mean 'scenes-unet'?"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["e.lock"]


def test_an_onnxruntime_engine_runs_without_torch(tmp_path):
    engine = build(affine(), target="onnxruntime:cpu", out=tmp_path / "affine")
    code = (
        "import sys, numpy as np; from hasten.backends.engine import load; "
        "y = load(sys.argv[1])(x=np.ones((5, 4), np.float32), b=np.ones(3, np.float32))['y']; "
        "assert y.tolist() == [[19.0, 23.0, 27.0]] * 5; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(engine.path)], check=True)


def test_exported_programs_and_their_files_are_sources(tiny, examples, tmp_path):
    program = torch.export.export(tiny, examples, strict=False)
    torch.export.save(program, tmp_path / "tiny.pt2")
    agree(build(program, target="onnxruntime:cpu", out=tmp_path / "a"), tiny, *examples)
    agree(build(tmp_path / "tiny.pt2", target="onnxruntime:cpu", out=tmp_path / "b"), tiny, *examples)


def test_progress_tells_every_stage_in_order(tiny, examples, tmp_path):
    seen = []
    build(
        tiny,
        target="onnxruntime:cpu",
        out=tmp_path / "tiny",
        example_inputs=examples,
        progress=lambda stage, fraction: seen.append((stage, fraction)),
    )
    assert [s for s, _ in seen] == ["capture", "optimize", "export", "compile", "write", "write"]
    assert [f for _, f in seen] == sorted(f for _, f in seen)
    assert seen[-1][1] == 1.0


# --- ONNX sources


def affine(batch="batch", dtype=TensorProto.FLOAT):
    """y = x @ w + b, with a symbolic batch."""
    weight = helper.make_tensor("w", dtype, (4, 3), np.arange(12, dtype=np.float32))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        "affine",
        [helper.make_tensor_value_info("x", dtype, (batch, 4)), helper.make_tensor_value_info("b", dtype, (3,))],
        [helper.make_tensor_value_info("y", dtype, (batch, 3))],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_onnx_files_and_models_are_sources(tmp_path):
    onnx.save(affine(), tmp_path / "affine.onnx")
    x, b = np.ones((5, 4), dtype=np.float32), np.ones(3, dtype=np.float32)
    for number, source in enumerate((affine(), tmp_path / "affine.onnx", str(tmp_path / "affine.onnx"))):
        engine = build(source, target="onnxruntime:cpu", out=tmp_path / str(number))
        assert engine(x=x, b=b)["y"].tolist() == [[19.0, 23.0, 27.0]] * 5
        assert engine.manifest.dims == {"batch": (1, None)}
        assert engine.report["ir"] == "onnx"


def test_shapes_fix_or_bound_the_sizes_of_an_onnx_source(tmp_path):
    fixed = build(affine(), target="onnxruntime:cpu", out=tmp_path / "a", shapes="x:2x4")
    assert [t.shape for t in fixed.inputs + fixed.outputs] == [(2, 4), (3,), (2, 3)]
    bounded = build(affine(), target="onnxruntime:cpu", out=tmp_path / "b", shapes=("x:1x4", "x:2x4", "x:8x4"))
    assert bounded.inputs[0].shape == ("batch", 4)
    assert bounded.manifest.dims == {"batch": (1, 8)}


def test_large_weights_are_kept_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hasten.passes.onnx.io.INLINE_LIMIT", 10)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 64))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 64))],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    engine = build(model, target="onnxruntime:cpu", out=tmp_path / "large")
    assert sorted(p.name for p in engine.path.iterdir()) == ["manifest.json", "model.onnx", "model.onnx.data"]
    assert engine.manifest.files["model.onnx.data"][1] >= weight.nbytes
    np.testing.assert_allclose(engine(x=np.eye(1, 64, dtype=np.float32))["y"], weight[:1], rtol=1e-6)


# --- refusals


def message(kind, code, *args, **kwargs):
    with pytest.raises(kind) as caught:
        build(*args, **kwargs)
    assert caught.value.exit_code == code
    return str(caught.value)


def test_message_for_options_that_do_not_go_together(tiny, examples, tmp_path):
    out = tmp_path / "engine"
    program = torch.export.export(tiny, examples, strict=False)
    for kwargs, text in [
        (
            {"source": affine(), "target": "aoti:cpu"},
            "target aoti:cpu is built from PyTorch, and nothing here turns an ONNX model into a PyTorch graph; "
            "build the ONNX model for onnxruntime:cpu, or give the module",
        ),
        (
            {"source": affine(), "target": "onnxruntime:cpu", "dtype": "float16"},
            "dtype: an ONNX model has its dtypes already; convert the module and export it again",
        ),
        (
            {"source": affine(), "target": "onnxruntime:cpu", "dynamic_shapes": {}},
            "dynamic_shapes: for modules; the sizes of an ONNX source are given as shapes",
        ),
        (
            {"source": affine(), "target": "onnxruntime:cpu", "example_inputs": examples},
            "example_inputs: for modules; an ONNX model needs none",
        ),
        (
            {"source": affine(), "target": "onnxruntime:cpu", "weights": "unet"},
            "weights: for registered models; the source here brings its own",
        ),
        (
            {"source": tiny, "target": "inductor:cpu", "example_inputs": examples},
            "target inductor:cpu compiles in the process that runs (torch.compile(model, backend='hasten')); an "
            "engine on disk is aoti:cpu",
        ),
        (
            {"source": tiny, "target": "aoti:cpu"},
            "a module is captured on examples: give example_inputs or example_kwargs for Tiny",
        ),
        (
            {"source": tiny, "target": "onnxruntime:cpu", "example_inputs": examples, "shapes": "sample:1x4x8x8"},
            "shapes: for ONNX sources; the sizes of a PyTorch source are those of its example inputs",
        ),
        (
            {"source": tiny, "target": "onnxruntime:cpu", "example_inputs": examples, "dtype": "bfloat16"},
            "target onnxruntime:cpu, dtype bfloat16: ONNX Runtime has no bfloat16 kernels on a CPU; use float32 "
            "or float16",
        ),
        (
            {"source": tiny, "target": "aoti:cpu", "example_inputs": examples, "dtype": "flaot32"},
            "dtype 'flaot32' is none of float32, float16, bfloat16. Did you mean 'float32'?",
        ),
        (
            {"source": program, "target": "onnxruntime:cpu", "dtype": "float16"},
            "dtype: an ExportedProgram has its dtypes already; convert the module and export it again",
        ),
        (
            {"source": program, "target": "onnxruntime:cpu", "example_inputs": examples},
            "example_inputs: for modules; the source here brings its own",
        ),
        (
            {"source": tiny, "target": "onnxruntime:cpu", "example_inputs": examples, "options": {"freezing": True}},
            "options: Inductor's, for aoti targets; the target is onnxruntime:cpu",
        ),
        (
            {"source": tiny, "target": "aoti:cpu", "example_inputs": examples, "options": {"freezign": True}},
            "Inductor has no option 'freezign'. Did you mean 'freezing'?",
        ),
        ({"source": "missing.onnx", "target": "onnxruntime:cpu"}, "source 'missing.onnx': there is no such file"),
        (
            {"source": 3, "target": "onnxruntime:cpu"},
            "source: expected a module, an ExportedProgram, an ONNX model, an Adapter, a path or a name, found int",
        ),
    ]:
        assert message(UsageError, 2, out=out, **kwargs) == text
        assert not out.exists()


def test_message_for_a_model_that_onnxruntime_cannot_run(tmp_path):
    text = message(HastenError, 1, affine(dtype=TensorProto.BFLOAT16), target="onnxruntime:cpu", out=tmp_path / "e")
    assert text.startswith("ONNX Runtime cannot run model.onnx on cpu: ")
    assert "MatMul" in text
    assert "\n" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["e.lock"]


def test_cuda_provider_is_asked_for_and_never_replaced(tiny, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    text = message(
        MissingPackageError, 4, tiny, target="onnxruntime:cuda", out=tmp_path / "engine", example_inputs=examples
    )
    assert text.endswith(
        " was built without CUDAExecutionProvider, which onnxruntime:cuda needs: pip uninstall -y onnxruntime "
        "&& pip install onnxruntime-gpu"
    )


def test_a_missing_compiler_is_named_before_any_work(tiny, examples, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.delenv("CXX", raising=False)
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not inductor.have_cxx_compiler()
        text = message(
            MissingPackageError, 4, tiny, target="aoti:cpu", out=tmp_path / "engine", example_inputs=examples
        )
    assert text == (
        "target aoti:cpu compiles C++ and 'g++' was not found: apt install g++, or set CXX to a C++17 compiler; "
        "onnxruntime:cpu needs none"
    )


def test_a_gpu_that_is_not_there_is_named_before_any_work(tiny, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = message(HastenError, 1, tiny, target="aoti:cuda", out=tmp_path / "engine", example_inputs=examples)
    assert text == "target aoti:cuda compiles on an NVIDIA GPU, and torch finds none here; build it on one"


def test_a_full_disk_is_found_before_torch_ends_the_process_for_it(tiny, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=32 << 20))
    out = tmp_path / "engine"
    assert message(HastenError, 1, tiny, target="aoti:cpu", out=out, example_inputs=examples) == (
        f"engine '{out}': no space left on the disk; nothing was written: free some or choose another folder"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["engine.lock"]


def test_message_for_examples_on_another_device(tmp_path):
    with pytest.raises(HastenError) as caught:
        inductor.package(
            torch.fx.symbolic_trace(torch.nn.ReLU()), [torch.ones(1, device="meta")], None, "cpu", tmp_path
        )
    assert str(caught.value) == ("target aoti:cpu: example input 0 is on meta; move the module and its inputs to cpu")


def test_pt2_files_that_are_no_sources(tmp_path, aoti_engine):
    (tmp_path / "text.pt2").write_text("hello")
    assert message(HastenError, 1, tmp_path / "text.pt2", target="onnxruntime:cpu", out=tmp_path / "e") == (
        f"'{tmp_path / 'text.pt2'}' is no file that torch.export.save wrote"
    )
    package = aoti_engine.path / "model.pt2"
    assert message(UsageError, 2, package, target="onnxruntime:cpu", out=tmp_path / "e") == (
        f"'{package}' is a compiled package, not a source; run it with torch._inductor.aoti_load_package"
    )


class Explodes:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a pickle ran')",))


def test_a_pickle_in_a_pt2_file_is_not_run(tiny, examples, tmp_path):
    import zipfile

    torch.export.save(torch.export.export(tiny, examples, strict=False), tmp_path / "good.pt2")
    evil = io.BytesIO()
    torch.save((Explodes(),), evil)
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, evil.getvalue() if "sample_inputs" in name else good.read(name))
    text = message(HastenError, 1, tmp_path / "evil.pt2", target="onnxruntime:cpu", out=tmp_path / "e")
    assert text.startswith(f"'{tmp_path / 'evil.pt2'}' cannot be read: Weights only load failed")
