"""TensorRT-RTX builds without a GPU, their audit, and what happens when a builder fails."""

import os
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hasten.backends.build import build
from hasten.backends.engine import load
from hasten.backends.plan_audit import audit, header_problem
from hasten.backends.shapes import parse_profiles
from hasten.backends.target import parse_target
from hasten.backends.tensorrt import build_plan, diagnose
from hasten.backends.tensorrt_graph import prepare_for_tensorrt
from hasten.errors import HastenError, MissingPackageError, UsageError

pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
SM89 = parse_target("tensorrt-rtx:sm89")


def model(nodes, inputs, outputs, initializers=(), opset=23, dtype=TensorProto.FLOAT16, domains=()):
    def value(name, shape):
        return helper.make_tensor_value_info(name, dtype, shape)

    graph = helper.make_graph(
        nodes, "g", [value(*i.popitem()) for i in inputs], [value(*o.popitem()) for o in outputs], list(initializers)
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def attention_model(q="x", k="x", v="x", dtype=TensorProto.FLOAT16, **attributes):
    node = helper.make_node("Attention", [q, k, v], ["y"], name="attend", scale=0.125, **attributes)
    shape = (1, 2, 64, 64)
    names = dict.fromkeys((q, k, v))
    return model([node], [{n: shape} for n in names], [{"y": shape}], dtype=dtype)


def saved(proto, tmp_path):
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


# --- real builds


@pytest.mark.parametrize("target", ["tensorrt-rtx:sm89", "tensorrt-rtx:sm120", "tensorrt-rtx:sm89,sm120"])
def test_builds_an_engine_without_a_gpu_and_audits_it(tiny, examples, tmp_path, monkeypatch, target):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = build(tiny, target=target, out=tmp_path / "tiny", example_inputs=examples, dtype="float16")
    found = engine.manifest.audit
    assert found["readable"]
    assert found["stream_capturable"]
    assert found["accelerators"] == sorted(parse_target(target).architectures)
    assert {k: found["counts"][k] for k in ("gemm_mha", "SiluGnor", "corrltn", "cjmp")} == {
        "gemm_mha": 1,
        "SiluGnor": 1,
        "corrltn": 2,
        "cjmp": 0,
    }
    assert found["layers"]["NORMALIZATION"] == 1
    assert found["peak_bytes"] > 50e6
    assert sorted(p.name for p in engine.path.iterdir()) == ["manifest.json", "model.plan"]
    assert engine.manifest.versions["tensorrt-rtx"].startswith("1.")
    with pytest.raises(HastenError) as caught:
        load(engine.path)(sample=examples[0].half(), timestep=examples[1].half())
    assert str(caught.value) == f"engine 'tiny' ({target}) needs an NVIDIA GPU, and torch finds none here"


def test_dynamic_sizes_become_a_profile(tiny, examples, dynamic_shapes, tmp_path):
    engine = build(
        tiny, target="tensorrt-rtx:sm89", out=tmp_path / "tiny", example_inputs=examples, dynamic_shapes=dynamic_shapes
    )
    assert engine.inputs[0].shape == ("batch", 4, "size", 16)
    assert engine.manifest.dims == {"batch": (1, 8), "size": (8, 32)}


def test_dynamic_onnx_inputs_need_shapes(tmp_path):
    relu = model([helper.make_node("Relu", ["x"], ["y"])], [{"x": ("b", 4)}], [{"y": ("b", 4)}])
    with pytest.raises(UsageError) as caught:
        build(relu, target="tensorrt-rtx:sm89", out=tmp_path / "relu")
    assert str(caught.value) == (
        "target tensorrt-rtx:sm89: input 'x' has dynamic sizes (b, 4); give shapes, three of them for min, opt "
        "and max, or one to fix them"
    )
    bounded = build(relu, target="tensorrt-rtx:sm89", out=tmp_path / "relu", shapes=("x:1x4", "x:2x4", "x:8x4"))
    assert bounded.manifest.dims == {"b": (1, 8)}


def conditional(body):
    """If(flag): a body in the one branch, the input itself in the other."""
    shape = (1, 8, 16, 16)
    out = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["reused"])], "then", [], [out("reused", TensorProto.FLOAT16, shape)]
    )
    otherwise = helper.make_graph(body, "else", [], [out("made", TensorProto.FLOAT16, shape)])
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise)],
        "g",
        [out("x", TensorProto.FLOAT16, shape), out("flag", TensorProto.BOOL, ())],
        [out("y", TensorProto.FLOAT16, shape)],
        [numpy_helper.from_array(np.ones((8, 8, 3, 3), dtype=np.float16), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_a_conditional_is_a_jump_and_cannot_be_captured(tmp_path):
    skipped = conditional([helper.make_node("Conv", ["x", "w"], ["made"], pads=[1, 1, 1, 1])])
    found = build_plan(saved(prepare_for_tensorrt(skipped), tmp_path), tmp_path, SM89).audit
    assert found["counts"]["cjmp"] == 1
    assert found["stream_capturable"] is False


def test_one_tensor_for_query_and_key_crashes_the_builder_unless_prepared(tmp_path):
    with pytest.raises(HastenError) as caught:
        build_plan(saved(attention_model(), tmp_path), tmp_path, SM89)
    assert str(caught.value).startswith("target tensorrt-rtx:sm89: the builder crashed (segmentation fault) at ")
    prepared = prepare_for_tensorrt(attention_model())
    found = build_plan(saved(prepared, tmp_path), tmp_path, SM89)
    assert found.audit["counts"]["gemm_mha"] == 1


def test_float32_attention_builds_when_prepared(tmp_path):
    unprepared = attention_model("q", "k", "v", dtype=TensorProto.FLOAT)
    with pytest.raises(HastenError, match=r"^target tensorrt-rtx:sm89: the build fails: .*dedicated kernel"):
        build_plan(saved(unprepared, tmp_path), tmp_path, SM89)
    build_plan(saved(prepare_for_tensorrt(unprepared), tmp_path), tmp_path, SM89)


def test_the_parser_names_the_node_that_it_refuses(tmp_path):
    det = helper.make_node("Det", ["x"], ["y"], name="my_det")
    graph = model([det], [{"x": (2, 3, 3)}], [{"y": (2,)}], dtype=TensorProto.FLOAT)
    with pytest.raises(HastenError) as caught:
        build_plan(saved(graph, tmp_path), tmp_path, SM89)
    text = str(caught.value)
    assert text.startswith("target tensorrt-rtx:sm89: the ONNX parser refuses the graph: node 'my_det' (Det): ")


def test_profiles_that_do_not_fit_are_refused(tmp_path):
    relu = model([helper.make_node("Relu", ["x"], ["y"])], [{"x": ("b", 4)}], [{"y": ("b", 4)}])
    with pytest.raises(HastenError) as caught:
        build_plan(saved(relu, tmp_path), tmp_path, SM89)
    assert str(caught.value).startswith("target tensorrt-rtx:sm89: the build fails: ")
    assert "optimization profile" in str(caught.value)


# --- preparation


def test_preparation_marks_every_attention_and_is_idempotent():
    assert [n.op_type for n in prepare_for_tensorrt(attention_model("q", "k", "q")).graph.node] == ["Attention"]
    first = prepare_for_tensorrt(attention_model("q", "q", "v"))
    assert [n.op_type for n in first.graph.node] == ["Max", "Attention"]
    assert list(first.graph.node[1].input) == ["q", "q_y_key", "v"]
    assert [a.i for a in first.graph.node[1].attribute if a.name == "TRT_decomposable"] == [1]
    again = onnx.ModelProto()
    again.CopyFrom(first)
    assert prepare_for_tensorrt(again) == first


def test_values_that_the_builder_merges_are_one_tensor():
    def node(op, source, out, **attributes):
        return helper.make_node(op, [source], [out], **attributes)

    def prepared(*nodes):
        attend = helper.make_node("Attention", ["q", "k", "x"], ["y"])
        made = prepare_for_tensorrt(model([*nodes, attend], [{"x": (1, 2, 8, 8)}], [{"y": (1, 2, 8, 8)}]))
        return [n.op_type for n in made.graph.node if n.op_type == "Max"]

    assert prepared(node("Identity", "x", "q"), node("Identity", "x", "k")) == ["Max"]
    assert prepared(node("Relu", "x", "q"), node("Relu", "x", "k")) == ["Max"]
    assert prepared(node("Relu", "x", "q"), node("Sigmoid", "x", "k")) == []
    assert prepared(node("Softmax", "x", "q", axis=1), node("Softmax", "x", "k", axis=2)) == []


def test_preparation_reaches_functions_and_refuses_them_in_control_flow():
    body = helper.make_function(
        "hasten",
        "Attention",
        ["q"],
        ["y"],
        [helper.make_node("Attention", ["q", "q", "q"], ["y"], name="inner")],
        [helper.make_opsetid("", 23)],
    )
    call = helper.make_node("Attention", ["x"], ["y"], name="outer", domain="hasten")
    straight = model([call], [{"x": (1, 2, 8, 8)}], [{"y": (1, 2, 8, 8)}], domains=["hasten"])
    straight.functions.append(body)
    prepared = prepare_for_tensorrt(straight)
    assert [n.op_type for n in prepared.functions[0].node] == ["Max", "Attention"]
    branch = conditional([helper.make_node("Attention", ["x"], ["made"], name="outer", domain="hasten")])
    branch.functions.append(body)
    with pytest.raises(HastenError) as caught:
        prepare_for_tensorrt(branch)
    assert str(caught.value) == (
        "node 'inner' (Attention): TensorRT's attention layer cannot stand inside If, Loop or Scan; spell it "
        "out as MatMul, Softmax, MatMul, which is fused into the same kernel"
    )


def top_k(count):
    nodes = [helper.make_node("TopK", ["x", "k"], ["values", "indices"], name="prune")]
    k = numpy_helper.from_array(np.array([count]), "k")
    return model(nodes, [{"x": (1, 8192)}], [{"values": (1, count)}], [k])


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            conditional([helper.make_node("Attention", ["x", "x", "x"], ["made"], name="attend")]),
            "node 'attend' (Attention): TensorRT's attention layer cannot stand inside If, Loop or Scan; spell "
            "it out as MatMul, Softmax, MatMul, which is fused into the same kernel",
        ),
        (
            attention_model("q", "k", "v", softcap=30.0),
            "node 'attend' (Attention): TensorRT does not import attention with softcap",
        ),
        (
            model(
                [helper.make_node("Attention", ["q", "q", "q", "", "p", "p"], ["y"], name="cached")],
                [{"q": (1, 2, 8, 8)}, {"p": (1, 2, 8, 8)}],
                [{"y": (1, 2, 8, 8)}],
            ),
            "node 'cached' (Attention): TensorRT imports attention with one output and no key-value cache only",
        ),
        (top_k(3841), "node 'prune' (TopK): K is 3841, and TensorRT takes at most 3840; keep fewer"),
        (
            model(
                [helper.make_node("QuickGelu", ["x"], ["y"], domain="com.microsoft")],
                [{"x": (1, 4)}],
                [{"y": (1, 4)}],
                domains=["com.microsoft"],
            ),
            "node 'y' (QuickGelu): TensorRT's ONNX parser has no importer for com.microsoft.QuickGelu; use standard "
            "operators, or give the model a function of that name",
        ),
    ],
)
def test_preparation_names_the_node_that_cannot_be_built(graph, message):
    with pytest.raises(HastenError) as caught:
        prepare_for_tensorrt(graph)
    assert str(caught.value) == message


def test_preparation_leaves_what_can_be_built():
    prepare_for_tensorrt(top_k(3840))
    gelu = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    prepare_for_tensorrt(model([gelu], [{"x": (1, 4)}], [{"y": (1, 4)}], domains=["com.microsoft"]))


# --- audit and header


def test_audit_of_a_plan_without_text():
    assert audit(b"vtrt" + bytes(1000)) == {"readable": False, "reason": "not readable"}


PROGRAM = b"""header {
  version = 1.2
  stream_capturable=0
  accelerators={sm80 sm89 }
}
main {
 label bb1:
  function={ name=__myl_SiluGnor fqn=a }
  runtime_function={ name=__myl_SiluGnor fqn=b }
  function={ name=__myl_ReshGnorMul fqn=c }
  function={ name=_gemm_mha_v2 fqn=d }
  function={ name=_gemv_mha_v1 fqn=e }
  cjmp={ a }
  corrltn={ name="conv" }
  fully_connected={ name="linear" }
  runtime_fusion={ name=__myl_FcAdd }
}
"""


def test_audit_counts_every_kind():
    assert audit(b"\x00\xff" + PROGRAM + b"\x00rest") == {
        "readable": True,
        "stream_capturable": False,
        "accelerators": ["sm80", "sm89"],
        "counts": {
            "gemm_mha": 2,
            "SiluGnor": 2,
            "Gnor": 1,
            "corrltn": 1,
            "fully_connected": 1,
            "runtime_fusion": 1,
            "cjmp": 1,
        },
    }


def header(magic=b"vtrt", size=80, version=(1, 7, 1, 116), mask=0x18):
    return (
        magic
        + bytes(12)
        + struct.pack("<Q", size)
        + bytes(version)
        + bytes(4)
        + struct.pack("<I", mask)
        + bytes(80 - 0x24)
    )


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (header(), None),
        (b"vtrt", "the plan has 4 bytes, fewer than its header"),
        (header(magic=b"ftrt"), "the plan begins with b'ftrt', not b'vtrt'"),
        (header(size=81), "the header says 81 bytes, the plan has 80"),
        (header(version=(1, 6, 1, 120)), "the header says version 1.6.1.120, the builder is 1.7.1.116"),
        (header(mask=0x08), "the header names sm89, asked for sm89, sm120"),
        (header(mask=0), "the header names no architecture, asked for sm89, sm120"),
    ],
)
def test_header_problems(plan, problem):
    assert header_problem(plan, ("sm89", "sm120"), "1.7.1.116") == problem


# --- builders that fail, played by a module of that name


FAKE = """
import os, signal, time
__version__ = "11.4.0"
class ILogger:
    pass
class Builder:
    def __new__(cls, logger):
        {builder}
        return super().__new__(cls)
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags):
        assert flags == 1 << 3
        return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        {act}
        return b"plan of " + network.model
class Network:
    num_layers = 2
    def get_layer(self, i): return type("L", (), {{"type": "LayerType.CONVOLUTION"}})()
class Config:
    def add_optimization_profile(self, profile): return 0 if profile.ok else -1
class Profile:
    def set_shape(self, name, low, opt, high): self.ok = low <= opt <= high and name == "x"
class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): self.network = network
    def parse_from_file(self, path):
        self.network.model = open(path, "rb").read()
        return True
class Runtime:
    def __init__(self, logger): pass
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 3
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module called tensorrt, which a build for the sm90 GPU of this test finds."""

    def make(act="pass", builder="pass"):
        folder = tmp_path / "fake"
        folder.mkdir(exist_ok=True)
        (folder / "tensorrt.py").write_text(FAKE.format(act=act, builder=builder))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr("hasten.backends.tensorrt._gpu_architecture", lambda: "sm90")
        (tmp_path / "m.onnx").write_bytes(b"onnx")
        return lambda **kwargs: build_plan(tmp_path / "m.onnx", tmp_path, parse_target("tensorrt:sm90"), **kwargs)

    yield make
    sys.modules.pop("tensorrt", None)


def test_tensorrt_is_driven_by_the_same_code_without_what_only_rtx_has(fake, tmp_path):
    built = fake()(profiles=parse_profiles(("x:1", "x:2", "x:3")))
    assert (tmp_path / "model.plan").read_bytes() == b"plan of onnx"
    assert (built.version, built.layers) == ("11.4.0", {"CONVOLUTION": 2})
    assert built.audit == {"readable": False, "reason": "not readable"}


@pytest.mark.parametrize(
    ("act", "timeout", "message"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            60,
            "the builder crashed (segmentation fault) at 0.0 GB; it is known to when the query and key of an "
            "attention are one tensor: hasten reduce finds the part of the graph that it cannot take",
        ),
        (
            "os.abort()",
            60,
            "the builder aborted at 0.0 GB; it is known to on plugin nodes: hasten reduce finds the part of the "
            "graph that it cannot take",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            60,
            "the build process was killed at 0.0 GB, most often for want of memory; a build takes about 3x the weights",
        ),
        (
            "time.sleep(60)",
            1,
            "the build took longer than 1 s and was stopped at 0.0 GB; raise timeout or build a smaller graph",
        ),
        ("raise MemoryError('9 GB')", 60, "the build process ended with code 1 at 0.0 GB: MemoryError: 9 GB"),
        ("return None", 60, "the build fails: no reason given"),
    ],
)
def test_message_for_a_builder_that_fails(fake, act, timeout, message):
    with pytest.raises(HastenError) as caught:
        fake(act)(timeout=timeout)
    assert str(caught.value) == f"target tensorrt:sm90: {message}"
    assert caught.value.exit_code == 1


def test_message_for_a_builder_that_does_not_start(fake):
    with pytest.raises(HastenError) as caught:
        fake(builder="return None")()
    assert str(caught.value) == "target tensorrt:sm90: the builder does not start: no reason given"


def test_message_for_shapes_that_the_builder_refuses(fake):
    with pytest.raises(HastenError) as caught:
        fake()(profiles=parse_profiles("y:1"))
    assert str(caught.value) == "target tensorrt:sm90: the shapes do not fit the graph: no reason given"


def test_diagnosis_without_a_known_size():
    assert diagnose(-9, None, 60, "") == (
        "the build process was killed, most often for want of memory; a build takes about 3x the weights"
    )


def test_the_worker_ends_with_the_process_that_started_it(fake, tmp_path):
    started = fake(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    assert callable(started)
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "fake")!r})
        from pathlib import Path
        import hasten.backends.tensorrt as t
        from hasten.backends.target import parse_target
        t._gpu_architecture = lambda: "sm90"
        t.build_plan(Path({str(tmp_path / "m.onnx")!r}), Path({str(tmp_path)!r}), parse_target("tensorrt:sm90"))
    """)
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid = _eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    assert _eventually(lambda: not os.path.exists(f"/proc/{pid}") or _is_zombie(pid))


def _is_zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def _eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def test_message_for_a_missing_module(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    relu = model([helper.make_node("Relu", ["x"], ["y"])], [{"x": (1, 4)}], [{"y": (1, 4)}])
    with pytest.raises(MissingPackageError) as caught:
        build(relu, target="tensorrt:sm90", out=tmp_path / "relu")
    assert str(caught.value) == "tensorrt is not installed: pip install 'hasten[tensorrt]'"
    assert caught.value.exit_code == 4
    assert not (tmp_path / "relu").exists()


def test_tensorrt_builds_for_the_gpu_at_hand_only(fake, monkeypatch):
    run = fake()
    for found in (None, "sm80"):
        monkeypatch.setattr("hasten.backends.tensorrt._gpu_architecture", lambda found=found: found)
        with pytest.raises(HastenError) as caught:
            run()
        assert str(caught.value) == (
            f"target tensorrt:sm90: TensorRT builds for the GPU at hand, and here is {found or 'none'}; build on "
            "a sm90 machine, or for tensorrt-rtx, which needs no GPU"
        )


# --- running, with the runtime played by objects


class FakeRuntime:
    """Deserializes a plan into an engine that doubles x; on CPU memory."""

    class TensorIOMode:
        INPUT, OUTPUT = "in", "out"

    class Logger:
        ERROR = 1

        def __init__(self, level):
            pass

    __version__ = "1.7.1"

    def __init__(self, accepts=True):
        self.accepts = accepts
        self.calls = []

    def Runtime(self, logger):  # noqa: N802
        return self

    def deserialize_cuda_engine(self, plan):
        return self if self.accepts else None

    num_io_tensors = 2

    def get_tensor_name(self, index):
        return ("x", "out_x")[index]

    def get_tensor_mode(self, name):
        return "in" if name == "x" else "out"

    def create_execution_context(self):
        return self

    def set_input_shape(self, name, shape):
        self.calls.append(("shape", name, shape))
        self.shape = shape

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.calls.append(("address", name, address))

    def execute_async_v3(self, stream):
        self.calls.append(("run", stream))
        return self.accepts


def plan_runner(tmp_path, monkeypatch, runtime):
    from types import SimpleNamespace

    from hasten.backends.manifest import Manifest, TensorSpec
    from hasten.backends.tensorrt import PlanRunner

    monkeypatch.setattr("hasten.backends.tensorrt._gpu_architecture", lambda: "sm89")
    monkeypatch.setattr("hasten.backends.tensorrt.need", lambda module, extra: runtime)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: SimpleNamespace(cuda_stream=7))
    spec = TensorSpec("x", "float32", ("b", 4))
    (tmp_path / "model.plan").write_bytes(b"plan")
    manifest = Manifest("tensorrt-rtx:sm89", "model.plan", (spec,), (spec,), {"tensorrt-rtx": "1.6"}, {}, 0.0)
    return PlanRunner(tmp_path / "model.plan", manifest, SM89)


def test_runner_binds_inputs_by_name_and_outputs_by_position(tmp_path, monkeypatch):
    runtime = FakeRuntime()
    x = torch.ones(3, 4)
    (out,) = plan_runner(tmp_path, monkeypatch, runtime).run_torch([x])
    assert (out.shape, out.dtype) == ((3, 4), torch.float32)
    assert runtime.calls == [
        ("shape", "x", (3, 4)),
        ("address", "x", x.data_ptr()),
        ("address", "out_x", out.data_ptr()),
        ("run", 7),
    ]


def test_runner_names_the_versions_when_a_plan_does_not_load(tmp_path, monkeypatch):
    with pytest.raises(HastenError) as caught:
        plan_runner(tmp_path, monkeypatch, FakeRuntime(accepts=False))
    assert str(caught.value) == (
        f"engine '{tmp_path}': built with tensorrt-rtx 1.6, and tensorrt-rtx 1.7.1 here does not load it: build "
        "it again"
    )


def test_runner_refuses_another_gpu(tmp_path, monkeypatch):
    from hasten.backends.manifest import Manifest
    from hasten.backends.tensorrt import PlanRunner

    monkeypatch.setattr("hasten.backends.tensorrt._gpu_architecture", lambda: "sm90")
    with pytest.raises(HastenError) as caught:
        PlanRunner(tmp_path / "model.plan", Manifest("tensorrt-rtx:sm89", "m", (), (), {}, {}, 0.0), SM89)
    assert str(caught.value) == f"engine '{tmp_path}': built for tensorrt-rtx:sm89, and the GPU here is sm90"
