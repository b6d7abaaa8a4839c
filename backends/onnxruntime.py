"""ONNX Runtime engines: the model file, weights beside it when they are large, and a session that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.backends.manifest import Manifest
from hasten.backends.shapes import bound, evaluate
from hasten.errors import HastenError, MissingPackageError

if TYPE_CHECKING:
    import onnx
    import torch

ARTIFACT = "model.onnx"

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SLOWER = {"cpu": ["SkipLayerNormFusion"], "cuda": []}
"""Optimisers of ONNX Runtime that make slower what they fuse. Add and LayerNormalization apart against its fused
kernel, float32, 1 thread, milliseconds, ONNX Runtime 1.32: 16x64x160 0.13 and 0.82; 2x256x1152 0.52 and 2.9; 2x1024x640
1.2 and 10.5; 2x4096x320 2.4 and 25."""


def require_provider(device: str) -> str:
    """Return the execution provider for ``device``; `MissingPackageError` if this ONNX Runtime has none."""
    import onnxruntime

    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise MissingPackageError(
            f"onnxruntime {onnxruntime.__version__} was built without {provider}, which onnxruntime:{device} needs: "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    return provider


def save_model(model: onnx.ModelProto, directory: Path, name: str = ARTIFACT) -> list[str]:
    """Write the file ``name`` into ``directory``, large weights into a file beside it; returns the file names."""
    from hasten.passes.onnx import io

    return [file.name for file in io.write(model, directory / name)]


def check_loads(directory: Path, device: str, name: str = ARTIFACT) -> None:
    """Open the model in ``directory`` once, so that a model which cannot run is found when it is built."""
    _session(directory / name, device, threads=None)


def runtime_versions() -> dict[str, str]:
    """Find the version that an engine is built with."""
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}


class SessionRunner:
    """Runs a model file with all of ONNX Runtime's graph optimisations, on one provider and no other."""

    def __init__(self, artifact: Path, manifest: Manifest, device: str, *, threads: int | None = None) -> None:
        self._manifest = manifest
        self._device = device
        self._session = _session(artifact, device, threads=threads)
        # By position: in the graph an output cannot have an input's name.
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run_numpy(self, inputs: list[npt.NDArray[Any]], /) -> list[npt.NDArray[Any]]:
        feed = {spec.name: array for spec, array in zip(self._manifest.inputs, inputs, strict=True)}
        return self._session.run(self._outputs, feed)

    def run_torch(self, inputs: list[torch.Tensor], /) -> list[torch.Tensor]:
        import torch

        binding = self._session.io_binding()
        symbols: dict[str, int] = {}
        for spec, tensor in zip(self._manifest.inputs, inputs, strict=True):
            symbols.update(bound(spec.shape, tensor.shape))
            binding.bind_input(spec.name, *self._place(tensor.shape, spec.dtype, tensor))
        outputs: list[torch.Tensor | None] = []
        for name, spec in zip(self._outputs, self._manifest.outputs, strict=True):
            sizes = [evaluate(d, symbols) for d in spec.shape]
            if any(s is None for s in sizes):  # only the run itself can tell
                binding.bind_output(name, "cpu")
                outputs.append(None)
            else:
                outputs.append(torch.empty(sizes, dtype=getattr(torch, spec.dtype), device=self._device))
                binding.bind_output(name, *self._place(sizes, spec.dtype, outputs[-1]))
        if self._device == "cuda":
            torch.cuda.current_stream().synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        made = binding.get_outputs()
        return [
            torch.from_numpy(value.numpy()).to(self._device) if tensor is None else tensor
            for tensor, value in zip(outputs, made, strict=True)
        ]

    def _place(self, shape: Any, dtype: str, tensor: Any) -> tuple[str, int, Any, list[int], int]:
        index = tensor.device.index or 0
        return self._device, index, _element_type(dtype), list(shape), tensor.data_ptr()


def _session(artifact: Path, device: str, *, threads: int | None) -> Any:
    import onnxruntime

    provider = require_provider(device)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors; warnings of its optimiser say nothing that a user could act on
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(artifact), options, providers=[provider], disabled_optimizers=_SLOWER[device]
        )
    except Exception as error:
        raise HastenError(f"ONNX Runtime cannot run {artifact.name} on {device}: {_reason(error)}") from error
    if provider not in session.get_providers():  # it falls back on its own when the CUDA libraries do not load
        raise MissingPackageError(
            f"ONNX Runtime's {provider} did not start: check the GPU driver and pip install onnxruntime-gpu[cuda,cudnn]"
        )
    return session


def _element_type(dtype: str) -> Any:
    import onnx

    return onnx.TensorProto.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _reason(error: Exception) -> str:
    """Keep what it says after its own code and the path, which is a temporary one during a build."""
    text = str(error).strip().splitlines()[0]
    return text.partition("failed:")[2] or text
