"""TensorRT and TensorRT-RTX by one code path: graph preparation, a build in a subprocess, an audit, a runner.

TensorRT-RTX builds for a named architecture on a machine without a GPU; TensorRT builds for the GPU at hand. Engines
are strongly typed and never refittable or stripped of weights, which TensorRT-RTX cannot build without a GPU.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.backends.manifest import Manifest
from hasten.backends.plan_audit import audit, header_problem
from hasten.backends.shapes import Profile
from hasten.backends.target import Target
from hasten.errors import HastenError, need

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ARTIFACT = "model.plan"
TIMEOUT_SECONDS = 3600.0
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class Built:
    """A finished build: what the plan contains, what it cost (``peak_bytes``: resident, of the subprocess)."""

    version: str
    audit: Mapping[str, Any]
    layers: Mapping[str, int]
    seconds: float
    peak_bytes: int | None


def require(target: Target) -> None:
    """Raise `MissingPackageError` unless the target's module is installed, `HastenError` if it cannot build here."""
    need(_MODULES[target.backend], extra=target.backend)
    if target.backend == "tensorrt":
        found = _gpu_architecture()
        if found != target.architectures[0]:
            raise HastenError(
                f"target {target}: TensorRT builds for the GPU at hand, and here is {found or 'none'}; build on a "
                f"{target.architectures[0]} machine, or for tensorrt-rtx, which needs no GPU"
            )


def build_plan(
    model: Path,
    out_dir: Path,
    target: Target,
    profiles: Mapping[str, Profile] | None = None,
    *,
    timeout: float = TIMEOUT_SECONDS,
    name: str = ARTIFACT,
) -> Built:
    """Build ``model`` (an ONNX file from `prepare_for_tensorrt`) and write the plan ``name`` into ``out_dir``.

    ``profiles`` are needed for dynamic inputs. The builder runs in a subprocess; its crash, its time limit and its
    errors are each one `HastenError`. The plan is checked: well-formed, its header's version and architectures, and
    audited.
    """
    require(target)
    plan = out_dir / name
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        answer_file = Path(scratch) / "answer.json"
        request = {
            "module": _MODULES[target.backend],
            "model": str(model.resolve()),
            "plan": str(plan.resolve()),
            "answer": str(answer_file),
            "architectures": list(target.architectures),
            "profiles": {name: [list(s) for s in profile] for name, profile in (profiles or {}).items()},
        }
        (Path(scratch) / "request.json").write_text(json.dumps(request), encoding="utf-8")
        code, peak, errors = _run_worker(scratch, timeout)
        if code != 0 or not answer_file.is_file():
            raise HastenError(f"target {target}: {diagnose(code, peak, timeout, errors)}")
        answer = json.loads(answer_file.read_text(encoding="utf-8"))
    if answer.get("errno"):
        raise OSError(answer["errno"], os.strerror(answer["errno"]), str(plan))
    if "error" in answer:
        raise HastenError(f"target {target}: {answer['error']}")
    if answer["malformed"]:
        raise HastenError(f"target {target}: the runtime calls the plan that was just built malformed")
    if plan.stat().st_size == 0:
        raise HastenError(f"target {target}: {header_problem(b'', target.architectures, answer['version'])}")
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if target.backend == "tensorrt-rtx" and (
            problem := header_problem(content, target.architectures, answer["version"])
        ):
            raise HastenError(f"target {target}: {problem}")
        return Built(answer["version"], audit(content), answer["layers"], answer["seconds"], peak)


def diagnose(code: int | None, peak: int | None, timeout: float, errors: str) -> str:
    """Say in one sentence why the build process ended without an answer; ``code`` None: the time limit."""
    size = f" at {peak / 1e9:.1f} GB" if peak else ""
    if code is None:
        return f"the build took longer than {timeout:g} s and was stopped{size}; raise timeout or build a smaller graph"
    if code in (-11, 139):
        return (
            f"the builder crashed (segmentation fault){size}; it is known to when the query and key of an "
            "attention are one tensor: hasten reduce finds the part of the graph that it cannot take"
        )
    if code in (-6, 134):
        return (
            f"the builder aborted{size}; it is known to on plugin nodes: hasten reduce finds the part of the "
            f"graph that it cannot take{_tail(errors)}"
        )
    if code in (-9, 137):
        return f"the build process was killed{size}, most often for want of memory; a build takes about 3x the weights"
    return f"the build process ended with code {code}{size}{_tail(errors)}"


def _tail(errors: str) -> str:
    lines = errors.strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""


def _run_worker(scratch: str, timeout: float) -> tuple[int | None, int | None, str]:
    """Run the worker; returns its exit code (None: stopped at ``timeout``), its peak resident bytes, its stderr."""
    # The scratch folder is its working directory: `import tensorrt` must never find a file of the caller's folder.
    command = [sys.executable, "-m", "hasten.backends.tensorrt_worker", "request.json"]
    with (Path(scratch) / "stderr").open("w+b") as stderr:
        process = subprocess.Popen(command, cwd=scratch, stdout=subprocess.DEVNULL, stderr=stderr, env=_environment())
        try:
            code, peak = _wait(process, timeout)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        stderr.seek(0)
        return code, peak, stderr.read().decode(errors="replace")


def _environment() -> dict[str, str]:
    """Let the worker import what this process can, wherever it was started from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}


def _wait(process: subprocess.Popen[bytes], timeout: float) -> tuple[int | None, int | None]:
    deadline = time.monotonic() + timeout
    peak: int | None = None
    while process.poll() is None:
        # Not getrusage: what it reports of a child begins with the size of the process that it was forked from.
        peak = _peak_bytes(process.pid) or peak
        if time.monotonic() > deadline:
            return None, peak
        time.sleep(0.02)
    return process.returncode, peak


def _peak_bytes(pid: int) -> int | None:
    """Read a process's largest resident size; None where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


class PlanRunner:
    """Runs a plan on the current CUDA device and stream."""

    def __init__(self, artifact: Path, manifest: Manifest, target: Target) -> None:
        import torch

        found = _gpu_architecture()
        if found not in target.architectures:
            raise HastenError(f"engine '{artifact.parent}': built for {target}, and the GPU here is {found}")
        trt = need(_MODULES[target.backend], extra=target.backend)
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(artifact.read_bytes())
        if self._engine is None:
            raise HastenError(
                f"engine '{artifact.parent}': built with {target.backend} {manifest.versions.get(target.backend)}, and "
                f"{target.backend} {trt.__version__} here does not load it: build it again"
            )
        self._context = self._engine.create_execution_context()
        self._manifest = manifest
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        # By position: in the graph an output cannot have an input's name.
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._dtypes = [getattr(torch, t.dtype) for t in manifest.outputs]

    def run_torch(self, inputs: list[torch.Tensor], /) -> list[torch.Tensor]:
        import torch

        for spec, tensor in zip(self._manifest.inputs, inputs, strict=True):
            self._context.set_input_shape(spec.name, tuple(tensor.shape))
            self._context.set_tensor_address(spec.name, tensor.data_ptr())
        outputs = []
        for name, dtype in zip(self._outputs, self._dtypes, strict=True):
            shape = tuple(self._context.get_tensor_shape(name))
            outputs.append(torch.empty(shape, dtype=dtype, device=inputs[0].device))
            self._context.set_tensor_address(name, outputs[-1].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise HastenError(f"{self._manifest.target} engine: the run failed; the runtime's own message is above")
        return outputs

    def run_numpy(self, inputs: list[npt.NDArray[Any]], /) -> list[npt.NDArray[Any]]:
        import torch

        ready = [torch.from_numpy(a if a.flags.writeable else np.array(a)).cuda() for a in inputs]
        return [t.cpu().numpy() for t in self.run_torch(ready)]


def _gpu_architecture() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
