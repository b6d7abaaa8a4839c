"""What an engine is built for, and the support table: operator, dtype, target, control flow -> yes or why not.

The facts of the table were found by building and running (TensorRT-RTX 1.4 to 1.7, ONNX Runtime 1.31 and 1.32, torch
2.13, torch_tensorrt 2.13) or stand in the library's own list of kernels; a row says which where it matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hasten.errors import UsageError, nearest

DEVICES: dict[str, tuple[str, ...]] = {
    "inductor": ("cpu", "cuda"),
    "aoti": ("cpu", "cuda"),
    "onnxruntime": ("cpu", "cuda"),
}
"""Backends that are asked for with a device."""

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "tensorrt": ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"),
    "tensorrt-rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
}
"""Backends that are asked for with GPU architectures; TensorRT-RTX as its ComputeCapability enumeration has them."""

BACKENDS = (*DEVICES, *ARCHITECTURES, "torch-tensorrt")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """A backend, the device its engines run on, and the GPU architectures they are compiled for.

    >>> str(parse_target("tensorrt-rtx:sm89,sm120"))
    'tensorrt-rtx:sm89,sm120'
    >>> parse_target("onnxruntime:cpu").opset
    23
    """

    backend: str
    device: str
    architectures: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.architectures:
            return f"{self.backend}:{','.join(self.architectures)}"
        return self.backend if self.backend == "torch-tensorrt" else f"{self.backend}:{self.device}"

    @property
    def opset(self) -> int | None:
        """The ONNX opset its models are exported at; None where no ONNX model is made.

        23 has Attention, which ONNX Runtime has kernels for. 22 has GroupNormalization and keeps attention spelled out,
        the only form that TensorRT builds inside If, Loop and Scan too.
        """
        return {"onnxruntime": 23, "tensorrt": 22, "tensorrt-rtx": 22}.get(self.backend)

    @property
    def needs_profiles(self) -> bool:
        """Whether dynamic sizes must be bounded when an engine is built."""
        return self.backend in ("tensorrt", "tensorrt-rtx")

    def covers(self, pattern: str) -> bool:
        """Whether a row of the support table is about this target; ``pattern``: ``*``, backend, or backend:part."""
        backend, _, part = pattern.partition(":")
        return pattern == "*" or (backend == self.backend and (not part or part in (self.device, *self.architectures)))


def parse_target(text: str | Target) -> Target:
    """``backend:device`` or ``backend:architecture,architecture`` -> `Target`; `UsageError` for anything else."""
    if isinstance(text, Target):
        return text
    backend, colon, rest = text.partition(":")
    if backend not in BACKENDS:
        raise UsageError(
            f"target {text!r}: there is no backend {backend!r}; backends: {', '.join(BACKENDS)}."
            f"{nearest(backend, BACKENDS)}"
        )
    if backend == "torch-tensorrt":
        if colon:
            raise UsageError(f"target {text!r}: torch-tensorrt builds for the GPU at hand and takes nothing after it")
        return Target(backend, "cuda")
    if backend in DEVICES:
        return _device_target(text, backend, rest)
    return _architecture_target(text, backend, rest)


def _device_target(text: str, backend: str, device: str) -> Target:
    choices = DEVICES[backend]
    if device not in choices:
        found = f"no device {device!r}" if device else "no device given"
        raise UsageError(
            f"target {text!r}: {found}; {backend} takes {' or '.join(f'{backend}:{d}' for d in choices)}."
            f"{nearest(device, choices)}"
        )
    return Target(backend, device)


def _architecture_target(text: str, backend: str, rest: str) -> Target:
    choices = ARCHITECTURES[backend]
    names = tuple(rest.split(",")) if rest else ()
    if not names:
        raise UsageError(f"target {text!r}: no GPU architecture given; {backend} takes {', '.join(choices)}")
    for name in names:
        if name not in choices:
            other = f" (tensorrt:{name} is a target)" if name in ARCHITECTURES["tensorrt"] else nearest(name, choices)
            raise UsageError(
                f"target {text!r}: {backend} has no architecture {name!r}; it takes {', '.join(choices)}.{other}"
            )
    if len(set(names)) < len(names):
        raise UsageError(f"target {text!r}: an architecture is named twice")
    if backend == "tensorrt" and len(names) > 1:
        raise UsageError(f"target {text!r}: a TensorRT engine is for one architecture; build one engine for each")
    return Target(backend, "cuda", names)


@dataclass(frozen=True)
class Row:
    """One fact of the support table. ``control_flow`` None: wherever the operator stands. ``reason`` None: yes."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    target: str
    control_flow: bool | None
    reason: str | None


_ANY = ("*",)
_STANDARD = ("Attention", "Conv", "Gelu", "GroupNormalization", "LayerNormalization", "RMSNormalization")
_FUSED = ("Geglu", "GroupNormAct", "UpsampleConv2d")
_CONTRIB_EVERYWHERE = ("com.microsoft.Gelu", "com.microsoft.MultiHeadAttention")
_CONTRIB_NOT_TENSORRT = (
    "com.microsoft.BiasGelu",
    "com.microsoft.FastGelu",
    "com.microsoft.FusedConv",
    "com.microsoft.FusedMatMul",
    "com.microsoft.QuickGelu",
    "com.microsoft.SkipLayerNormalization",
)
_CONTRIB_ONLY_CUDA = (
    "com.microsoft.BiasAdd",
    "com.microsoft.BiasSplitGelu",
    "com.microsoft.GroupNorm",
    "com.microsoft.NhwcConv",
    "com.microsoft.PackedMultiHeadAttention",
    "com.microsoft.SkipGroupNorm",
)
OPS = tuple(sorted((*_STANDARD, *_FUSED, *_CONTRIB_EVERYWHERE, *_CONTRIB_NOT_TENSORRT, *_CONTRIB_ONLY_CUDA)))
"""Operators of the table: standard ONNX, hasten's fused ones (which carry a function body), ONNX Runtime's contrib.

``Attention`` is the attention operator or layer; spelled out as MatMul, Softmax, MatMul it is no operator of the table.
"""

_CONTRIB = (*_CONTRIB_EVERYWHERE, *_CONTRIB_NOT_TENSORRT, *_CONTRIB_ONLY_CUDA)
_NOT_IN_TORCH = "a torch graph has no ONNX Runtime contrib operators"
_NO_IMPORTER = "TensorRT's ONNX parser has no importer for it ('Plugin not found'); use standard operators"
_ATTENTION_LAYER = (
    "TensorRT's attention layer cannot stand inside If, Loop or Scan; spell it out as MatMul, Softmax, MatMul, which "
    "is fused into the same kernel"
)
_BF16_CPU = "ONNX Runtime has no bfloat16 kernels on a CPU; use float32 or float16"
_BF16_SM75 = "sm75 has no bfloat16 arithmetic; use float16"
_NO_COND = "torch_tensorrt has no converter for torch.cond; build tensorrt or tensorrt-rtx from ONNX instead"

SUPPORT: tuple[Row, ...] = (
    # The first row that fits answers.
    Row(_ANY, ("bfloat16",), "tensorrt:sm75", None, _BF16_SM75),
    Row(_ANY, ("bfloat16",), "tensorrt-rtx:sm75", None, _BF16_SM75),
    Row((*_CONTRIB_NOT_TENSORRT, *_CONTRIB_ONLY_CUDA), _ANY, "tensorrt", None, _NO_IMPORTER),
    Row((*_CONTRIB_NOT_TENSORRT, *_CONTRIB_ONLY_CUDA), _ANY, "tensorrt-rtx", None, _NO_IMPORTER),
    # float32 attention and head widths above 256 build only with the node attribute TRT_decomposable=1, which
    # prepare_for_tensorrt sets on every attention; so this is a yes outside control flow.
    Row(("Attention", "com.microsoft.MultiHeadAttention"), _ANY, "tensorrt", True, _ATTENTION_LAYER),
    Row(("Attention", "com.microsoft.MultiHeadAttention"), _ANY, "tensorrt-rtx", True, _ATTENTION_LAYER),
    Row(_ANY, _ANY, "tensorrt", None, None),
    Row(_ANY, _ANY, "tensorrt-rtx", None, None),
    # LayerNormalization is the one operator with a bfloat16 CPU kernel; its neighbours (Add, MatMul) have none.
    Row(_ANY, ("bfloat16",), "onnxruntime:cpu", None, _BF16_CPU),
    Row(_CONTRIB_ONLY_CUDA, _ANY, "onnxruntime:cpu", None, "ONNX Runtime has a kernel for it on CUDA only"),
    Row(_ANY, _ANY, "onnxruntime", None, None),
    Row(_CONTRIB, _ANY, "*", None, _NOT_IN_TORCH),
    Row(_ANY, _ANY, "torch-tensorrt", True, _NO_COND),
    Row(_ANY, _ANY, "*", None, None),
)


def supports(op: str, dtype: str, target: str | Target, *, in_control_flow: bool = False) -> str | None:
    """None if ``op`` may stand in the graph that ``target``'s compiler is given, else the reason why not.

    ``op`` is one of `OPS`, ``dtype`` one of `DTYPES`; ``in_control_flow``: inside If, Loop, Scan or torch.cond.

    >>> supports("Attention", "float16", "tensorrt-rtx:sm89")
    >>> supports("com.microsoft.GroupNorm", "float32", "onnxruntime:cpu")
    'ONNX Runtime has a kernel for it on CUDA only'
    """
    parsed = parse_target(target)
    _known("operator", op, OPS)
    _known("dtype", dtype, DTYPES)
    for row in SUPPORT:
        if (
            _fits(op, row.ops)
            and _fits(dtype, row.dtypes)
            and row.control_flow in (None, in_control_flow)
            and parsed.covers(row.target)
        ):
            return row.reason
    raise AssertionError("the last row of SUPPORT fits everything")


def _fits(name: str, names: tuple[str, ...]) -> bool:
    return names == _ANY or name in names


def _known(kind: str, name: str, choices: Iterable[str]) -> None:
    if name not in choices:
        raise UsageError(f"the support table has no {kind} {name!r}.{nearest(name, choices)}")
