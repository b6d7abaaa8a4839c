"""The audit of plans, and builders and runtimes that fail, played by modules and objects of that name."""

import errno
import os
import struct
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from onnx import TensorProto, helper

from hasten.backends.build import build
from hasten.backends.plan_audit import audit, header_problem
from hasten.backends.shapes import parse_profiles
from hasten.backends.target import parse_target
from hasten.backends.tensorrt import build_plan, diagnose
from hasten.errors import HastenError, MissingPackageError

SM89 = parse_target("tensorrt-rtx:sm89")


def relu():
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


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
  fully_connected={ name="embedding" }
  cjmp={ name="a" op=eq target={bb2 bb3 } }
 label bb2:
  corrltn={ name="conv" }
  function={ name=_gemm_mha_v2 fqn=f }
  jmp={ name="b" target={bb4 } }
 label bb3:
  function={ name=__myl_Add fqn=g }
  jmp={ name="c" target={bb4 } }
 label bb4:
  runtime_fusion={ name=__myl_FcAdd }
}
"""


def test_audit_counts_every_kind():
    assert audit(b"\x00\xff" + PROGRAM + b"\x00rest") == {
        "readable": True,
        "stream_capturable": False,
        "accelerators": ["sm80", "sm89"],
        "counts": {
            "gemm_mha": 3,
            "SiluGnor": 2,
            "Gnor": 1,
            "corrltn": 1,
            "fully_connected": 1,
            "runtime_fusion": 1,
            "cjmp": 1,
        },
        "behind_jumps": {
            "gemm_mha": 1,
            "SiluGnor": 0,
            "Gnor": 0,
            "corrltn": 1,
            "fully_connected": 0,
            "runtime_fusion": 0,
            "cjmp": 0,
        },
        "bytes": {"plan": len(PROGRAM) + 7, "kernels": 0, "program": len(PROGRAM), "rest": 7},
    }


def test_audit_tells_the_source_of_kernels_from_weights():
    """Text around ``__global__`` is a kernel's, however long; text without it, or that ends, is not."""
    first = b"#include <cuda>\n" + 40000 * b"// a\n" + b"\t__global__ void a() {}\n__global__ void b() {}"
    second = b"__global__ void c() {}"
    weights = bytes(range(256)) * 300
    plan = b"vtrt\0" + PROGRAM + b"\0" + first + weights + b"\0names of layers\0" + second
    assert audit(plan)["bytes"] == {
        "plan": len(plan),
        "kernels": len(first) + len(second),
        "program": len(PROGRAM),
        "rest": len(plan) - len(first) - len(second) - len(PROGRAM),
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


def test_a_full_disk_reaches_the_caller_as_one(fake):
    with pytest.raises(OSError, match="No space left on device") as caught:
        fake("raise OSError(28, 'full')")()
    assert caught.value.errno == errno.ENOSPC


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
    with pytest.raises(MissingPackageError) as caught:
        build(relu(), target="tensorrt:sm90", out=tmp_path / "relu")
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
