"""Implementations of ``hasten bench`` that build a file first and run it in another process, which need not know torch.

A function whose name starts with ``build`` runs in a process of its own and leaves everything in the folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import HastenError
from hasten.tools.bench_subject import Subject

Call = Callable[[], Any]
_INPUTS = "inputs.npz"


def build_onnx(subject: Subject, folder: Path) -> None:
    """Export as a user does it without us: torch's exporter at the opset that our own engines have."""
    import torch

    from hasten.backends.target import parse_target

    inputs = _save_inputs(subject, folder)
    opset = parse_target("onnxruntime:cpu").opset
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            subject.module(), (), kwargs=inputs, dynamo=True, opset_version=opset, verbose=False
        )
    program.save(folder / "model.onnx", external_data=True)


def onnxruntime(subject: Subject, folder: Path) -> Call:
    """A session with the default options but for the number of threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = subject.threads
    providers = ["CPUExecutionProvider"]
    if subject.device == "cuda":
        from hasten.backends.onnxruntime import require_provider

        providers = [require_provider("cuda"), *providers]
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
    inputs = _load_inputs(folder)
    feed = {i.name: inputs[i.name] for i in session.get_inputs()}
    if subject.device == "cpu":
        return lambda: session.run(None, feed)
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")

    def call() -> Any:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    return call


def build_openvino(subject: Subject, folder: Path) -> None:
    """Convert torch's export, weights kept as they are."""
    import openvino
    import torch

    inputs = _save_inputs(subject, folder)
    with torch.no_grad():
        program = torch.export.export(subject.module(), (), inputs, strict=False)
    openvino.save_model(openvino.convert_model(program), folder / "model.xml", compress_to_fp16=False)


def openvino(subject: Subject, folder: Path) -> Call:
    """One stream, tuned for latency, and float32 arithmetic: the default is bfloat16 where the processor has it."""
    import openvino as ov

    model = ov.Core().compile_model(
        str(folder / "model.xml"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": subject.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if subject.dtype == "float32" else "f16",
        },
    )
    request = model.create_infer_request()
    inputs = list(_load_inputs(folder).values())
    # By position: the converter renames an input that is cast before anything else is done with it.
    feed = dict(enumerate(inputs))
    return lambda: list(request.infer(feed, share_inputs=True, share_outputs=True).values())


def build_engine(subject: Subject, folder: Path, *, target: str) -> None:
    """``hasten.build``."""
    from hasten import build

    inputs = subject.inputs()
    if "bfloat16" not in {str(t.dtype).removeprefix("torch.") for t in inputs.values()}:
        _save_inputs(subject, folder)
    adapter = subject.adapter()
    if adapter is not None:
        dtype = None if subject.dtype == "float32" else subject.dtype
        build(adapter, target=target, out=folder / "engine", dtype=dtype)
    else:
        build(subject.module(), example_kwargs=inputs, target=target, out=folder / "engine")


def engine(subject: Subject, folder: Path) -> Call:
    """``hasten.load``, called with what its runtime takes at no cost: numpy arrays, or torch tensors of a package."""
    from hasten import load
    from hasten.backends.manifest import read_manifest

    if read_manifest(folder / "engine").target.startswith("onnxruntime"):
        loaded = load(folder / "engine", threads=subject.threads)
        arrays = _load_inputs(folder)
        return lambda: loaded(**arrays)
    inputs = subject.inputs()
    loaded = load(folder / "engine")
    return lambda: loaded(**inputs)


def _save_inputs(subject: Subject, folder: Path) -> dict[str, Any]:
    inputs = subject.inputs()
    if subject.dtype == "bfloat16":
        raise HastenError("numpy has no bfloat16, so this runtime is timed in float32 and float16 only")
    np.savez(folder / _INPUTS, **{name: tensor.cpu().numpy() for name, tensor in inputs.items()})
    return inputs


def _load_inputs(folder: Path) -> dict[str, Any]:
    with np.load(folder / _INPUTS, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
