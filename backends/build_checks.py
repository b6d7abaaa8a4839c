"""What `build` refuses before it works: `UsageError` with what was asked, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hasten.backends.shapes import format_shape
from hasten.backends.target import DTYPES, Target, supports
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    from hasten.backends.manifest import TensorSpec
    from hasten.backends.sampling import Looping, Sampling


def loops(target: Target) -> None:
    """Refuse a target that a sampler cannot be built for."""
    if target.backend == "torch-tensorrt":
        raise UsageError(
            f"target {target} has no loops; build the sampler for aoti, onnxruntime, tensorrt or tensorrt-rtx"
        )


def without_runtime(target: Target) -> None:
    """Find out before minutes of work what would fail after them."""
    if target.backend == "inductor":
        raise UsageError(
            f"target {target} compiles in the process that runs (torch.compile(model, backend='hasten')); an "
            f"engine on disk is aoti:{target.device}"
        )
    if target.backend == "aoti":
        from hasten.backends import inductor

        inductor.require(target)
    elif target.backend == "onnxruntime":
        from hasten.backends.onnxruntime import require_provider

        require_provider(target.device)
    elif target.backend == "torch-tensorrt":
        from hasten.backends import torch_tensorrt

        torch_tensorrt.require()
    else:
        from hasten.backends import tensorrt

        tensorrt.require(target)


def for_onnx(target: Target, dtype: Any, dynamic_shapes: Any, example_inputs: Any, example_kwargs: Any) -> None:
    """Refuse for an ONNX source what is for modules, and targets that are built from modules alone."""
    if target.opset is None:
        raise UsageError(
            f"target {target} is built from PyTorch, and nothing here turns an ONNX model into a PyTorch graph; "
            "build the ONNX model for onnxruntime:cpu, or give the module"
        )
    if dtype is not None:
        raise UsageError("dtype: an ONNX model has its dtypes already; convert the module and export it again")
    if dynamic_shapes is not None:
        raise UsageError("dynamic_shapes: for modules; the sizes of an ONNX source are given as shapes")
    if example_inputs is not None or example_kwargs is not None:
        raise UsageError("example_inputs: for modules; an ONNX model needs none")


def check_dtype(dtype: str, target: Target) -> None:
    """Refuse a type that there is not, or that the target has no kernels for."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    if reason := supports("Conv", dtype, target):
        raise UsageError(f"target {target}, dtype {dtype}: {reason}")


def sizes_of_a_loop(given: Sequence[TensorSpec], target: Target, sampling: Sampling) -> None:
    """Refuse inputs of dynamic sizes where the target's loop, or the decoder, takes one size."""
    dynamic = next((s for s in given if any(isinstance(size, str) for size in s.shape)), None)
    if dynamic is None:
        return
    if target.backend not in ("onnxruntime", "aoti"):
        raise UsageError(
            f"target {target}: input {dynamic.name!r} has dynamic sizes {format_shape(dynamic.shape)}, and a "
            "sampling loop takes a range of sizes in ONNX Runtime and AOTInductor alone; fix the sizes, or build it "
            "for onnxruntime or aoti"
        )
    if sampling.decoder is not None:
        raise UsageError(
            f"input {dynamic.name!r} has dynamic sizes {format_shape(dynamic.shape)}, and the decoder of a sampler "
            "is built for one size of latents; fix the sizes, or decode the latents outside"
        )


def sorted_in_a_loop(looping: Looping, target: Target) -> None:
    """Refuse a threshold for which TensorRT would have to put too many values in order."""
    if target.backend not in ("tensorrt", "tensorrt-rtx"):
        return
    from hasten.backends.tensorrt_graph import MAX_TOPK

    if (top := looping.plan.sorted) > MAX_TOPK:
        raise UsageError(
            f"target {target}: the threshold's quantile needs a picture's {top} largest values in order, "
            f"and TopK takes at most {MAX_TOPK}; take a higher ratio, smaller pictures, or clip=…"
        )
