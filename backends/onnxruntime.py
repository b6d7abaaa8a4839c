"""ONNX Runtime engines: the model file, weights beside it when they are large, and a session that runs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
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
WEIGHTS = "model.onnx.data"
EXTERNAL_BYTES = 1_500_000_000
"""Models with more weights keep them in a second file: one protobuf message holds at most 2 GiB."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


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


def weight_bytes(model: onnx.ModelProto) -> int:
    """Count the bytes of all initializers, subgraphs and function bodies included."""
    return sum(tensor.ByteSize() for tensor in _tensors(model))


def save_model(model: onnx.ModelProto, directory: Path, *, external_bytes: int | None = None) -> list[str]:
    """Write ``model.onnx`` into ``directory``, and weights of more than ``external_bytes`` into ``model.onnx.data``.

    Returns the file names. The weights of ``model`` are moved out of it in the second case: it is used up.
    """
    import onnx

    size = weight_bytes(model)
    if size <= (EXTERNAL_BYTES if external_bytes is None else external_bytes):
        onnx.save(model, str(directory / ARTIFACT))
        return [ARTIFACT]
    if (free := shutil.disk_usage(directory).free) < size:
        raise HastenError(f"the weights take {size} bytes and the disk of '{directory.parent}' has {free} left")
    onnx.save(
        model,
        str(directory / ARTIFACT),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=WEIGHTS,
        size_threshold=1024,
        convert_attribute=False,
    )
    return [ARTIFACT, WEIGHTS]


def check_loads(directory: Path, device: str) -> None:
    """Open the model in ``directory`` once, so that a model which cannot run is found when it is built."""
    _session(directory / ARTIFACT, device, threads=None)


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
        session = onnxruntime.InferenceSession(str(artifact), options, providers=[provider])
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


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graph_tensors(graph)
