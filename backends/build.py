"""`build`: a source, a target, an engine directory.

A PyTorch source is captured, rewritten as an FX graph, and compiled by AOTInductor or exported to ONNX; an ONNX
source is rewritten as ONNX. Graphs are rewritten once, at the earliest form at hand; one report goes along into the
manifest.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.backends.directory import WAIT_SECONDS, publish
from hasten.backends.engine import Engine, load
from hasten.backends.manifest import Manifest, TensorSpec, write_manifest
from hasten.backends.onnx_signature import check_dynamic, fix_shapes, rename, signature
from hasten.backends.shapes import Profile, Shapes, check_profiles, format_shape, parse_profiles
from hasten.backends.target import DTYPES, Target, parse_target, supports
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    import onnx
    import torch

    from hasten.passes.rule import Report

Progress = Callable[[str, float], None]
STAGES = ("capture", "optimize", "export", "compile", "write")
"""What ``progress`` is told, with the part of the build that is done before the stage (0 to 1)."""


def build(
    source: Any,
    *,
    target: str | Target,
    out: str | os.PathLike[str],
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    shapes: Shapes | tuple[Shapes, Shapes, Shapes] | None = None,
    dtype: str | None = None,
    expect: Mapping[str, int] | None = None,
    fuel: int | None = None,
    skip: Iterable[str] = (),
    strict: bool = False,
    weights: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    overwrite: bool = False,
    wait: float = WAIT_SECONDS,
    progress: Progress | None = None,
) -> Engine:
    """Build an engine for ``target`` in the directory ``out``, and load it.

    ``source``: a module with ``example_inputs`` and ``example_kwargs``; an ExportedProgram or the path of a ``.pt2``
    file; an ONNX model or the path of an ``.onnx`` file; the name of a registered model (``weights`` as
    `models.registry.get` takes it), a diffusers directory, or an `Adapter`, whose sizes and names are taken.

    ``dynamic_shapes`` is as `torch.export.export` takes it, for modules. ``shapes`` are sizes by input name, for ONNX
    sources: one for fixed sizes, or three for the least, most frequent and greatest. ``dtype`` converts modules.
    ``expect``, ``fuel``, ``skip`` and ``strict`` are those of `optimize`. ``options`` are Inductor's (aoti).
    ``timeout`` bounds a TensorRT build, in seconds. ``overwrite`` replaces an existing engine; ``wait`` is for
    another build of the same output.

    Raises the `HastenError` that says what cannot be meant, captured, built or written; then nothing is left behind.
    """
    parsed = parse_target(target)
    _refuse_without_runtime(parsed)
    if dtype is not None:
        _check_dtype(dtype, parsed)
    tell = _Clock(progress)
    rules: dict[str, Any] = {
        "target": str(parsed),
        "expect": expect,
        "fuel": fuel,
        "skip": tuple(skip),
        "strict": strict,
    }
    kind = _kind(source, weights)
    with publish(out, overwrite=overwrite, wait=wait) as folder:
        if kind == "onnx":
            _refuse_for_onnx(parsed, source, dtype, dynamic_shapes, example_inputs, example_kwargs)
            tell("optimize", 0.0)
            product = _from_onnx(source, parsed, shapes, rules, folder, tell, timeout)
        else:
            if shapes is not None:
                raise UsageError(
                    "shapes: for ONNX sources; the sizes of a PyTorch source are those of its example inputs"
                )
            tell("capture", 0.0)
            device = parsed.device if parsed.backend == "aoti" else "cpu"  # where the examples are to be run
            origin = _origin(kind, source, example_inputs, example_kwargs, dynamic_shapes, dtype, weights, device)
            product = _from_torch(origin, parsed, rules, options, folder, tell, timeout)
        tell("write", 0.95)
        seconds = {**product.report["seconds"], **tell.seconds}
        report = {**product.report, "seconds": seconds}
        write_manifest(folder, replace(product, report=report, seconds=sum(tell.seconds.values())))
    tell("write", 1.0)
    return load(out)


class _Clock:
    """Passes progress on, and keeps how long each stage took."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now
        if self.progress is not None:
            self.progress(stage, fraction)


@dataclass(frozen=True)
class _Origin:
    """A PyTorch source, ready to be captured."""

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    name: str
    output_names: tuple[str, ...] | None = None


def _from_torch(
    origin: _Origin,
    target: Target,
    rules: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    folder: Path,
    tell: Progress,
    timeout: float | None,
) -> Manifest:
    from hasten.backends.capture import capture
    from hasten.backends.optimize import optimize
    from hasten.backends.program import dim_names, flatten

    program = capture(origin.module, origin.args, origin.kwargs, origin.dynamic_shapes)
    tell("optimize", 0.2)
    rewritten, report = optimize(program, source=origin.name, **rules)
    named = dim_names(program, origin.dynamic_shapes)
    flat = flatten(rewritten, program, output_names=origin.output_names, dim_names=named)
    product = Manifest(
        target=str(target),
        artifact="",
        inputs=flat.inputs,
        outputs=flat.outputs,
        versions={},
        report={},
        seconds=0.0,
        dims=flat.dims,
        constants=flat.constants,
    )
    if target.backend == "aoti":
        from hasten.backends import inductor

        tell("compile", 0.3)
        files = inductor.package(flat.module, flat.example_inputs, flat.dynamic_shapes, target.device, folder, options)
        return replace(
            product, artifact=files[0], report=report.as_dict(), versions=_versions(inductor.runtime_versions())
        )
    if options:
        raise UsageError(f"options: Inductor's, for aoti targets; the target is {target}")
    if target.backend == "torch-tensorrt":
        from hasten.backends import torch_tensorrt

        tell("compile", 0.3)
        files = torch_tensorrt.package(flat.module, flat.example_inputs, flat.dynamic_shapes, folder)
        return replace(
            product, artifact=files[0], report=report.as_dict(), versions=_versions(torch_tensorrt.runtime_versions())
        )
    from hasten.backends.optimize import optimize_onnx
    from hasten.passes.fx.to_onnx import onnx_from_graph

    tell("export", 0.3)
    assert target.opset is not None, target
    model = onnx_from_graph(flat.module, flat.example_inputs, target.opset, flat.dynamic_shapes)
    rename(model, [t.name for t in flat.inputs], [t.name for t in flat.outputs])
    check_dynamic(flat.inputs, signature(model).inputs)
    model, legalised = optimize_onnx(model, target=str(target), passes="legalise")
    _merge(report, legalised)
    profiles = {
        spec.name: _profile(spec, tensor, flat.dims)
        for spec, tensor in zip(flat.inputs, flat.example_inputs, strict=True)
    }
    return _lower_onnx(model, target, profiles if flat.dims else {}, product, report, folder, tell, timeout)


def _from_onnx(
    source: Any,
    target: Target,
    shapes: Shapes | tuple[Shapes, Shapes, Shapes] | None,
    rules: Mapping[str, Any],
    folder: Path,
    tell: Progress,
    timeout: float | None,
) -> Manifest:
    from hasten.backends.optimize import optimize_onnx

    profiles = parse_profiles(shapes) if shapes is not None else {}
    model, report = optimize_onnx(source, **rules)
    check_profiles(profiles, signature(model).inputs)
    fix_shapes(model, profiles)
    found = signature(model)
    dims = dict(found.dims)
    for spec in found.inputs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size in dims and spec.name in profiles:
                dims[size] = (profiles[spec.name].min[axis], profiles[spec.name].max[axis])
    product = Manifest(
        target=str(target),
        artifact="",
        inputs=found.inputs,
        outputs=found.outputs,
        versions={},
        report={},
        seconds=0.0,
        dims=dims,
    )
    return _lower_onnx(model, target, profiles, product, report, folder, tell, timeout)


def _lower_onnx(
    model: onnx.ModelProto,
    target: Target,
    profiles: Mapping[str, Profile],
    product: Manifest,
    report: Report,
    folder: Path,
    tell: Progress,
    timeout: float | None,
) -> Manifest:
    from hasten.backends import onnxruntime as ort

    tell("compile", 0.6)
    if target.backend == "onnxruntime":
        files = ort.save_model(model, folder)
        ort.check_loads(folder, target.device)
        return replace(product, artifact=files[0], report=report.as_dict(), versions=_versions(ort.runtime_versions()))
    from hasten.backends import tensorrt
    from hasten.backends.tensorrt_graph import prepare_for_tensorrt

    for spec in product.inputs:
        if spec.name not in profiles and any(isinstance(size, str) for size in spec.shape):
            raise UsageError(
                f"target {target}: input {spec.name!r} has dynamic sizes {format_shape(spec.shape)}; give "
                "shapes, three of them for min, opt and max, or one to fix them"
            )
    files = ort.save_model(prepare_for_tensorrt(model), folder)
    dynamic = {s.name: profiles[s.name] for s in product.inputs if any(isinstance(size, str) for size in s.shape)}
    built = tensorrt.build_plan(folder / files[0], folder, target, dynamic, timeout=timeout or tensorrt.TIMEOUT_SECONDS)
    for name in files:  # the plan holds the weights
        (folder / name).unlink()
    found = {
        **built.audit,
        "layers": dict(built.layers),
        "peak_bytes": built.peak_bytes,
        "build_seconds": built.seconds,
    }
    return replace(
        product,
        artifact=tensorrt.ARTIFACT,
        report=report.as_dict(),
        audit=found,
        versions=_versions({target.backend: built.version}),
    )


_FILES = {".onnx": "onnx", ".onnxtxt": "onnx", ".pt2": "pt2"}


def _kind(source: Any, weights: Any) -> str:
    """``onnx``, ``module``, ``program``, ``pt2``, ``name`` or ``adapter``."""
    if weights is not None and not isinstance(source, str):
        raise UsageError("weights: for registered models; the source here brings its own")
    if type(source).__module__.startswith("onnx") and hasattr(source, "graph"):
        return "onnx"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        suffix = Path(text).suffix
        if suffix in _FILES:
            if not Path(text).is_file():
                raise UsageError(f"source '{text}': there is no such file")
            return _FILES[suffix]
        if isinstance(source, str):
            return "name"
        raise UsageError(f"source '{text}': a path ends in .onnx or .pt2, or is a diffusers directory given as text")
    import torch

    from hasten.models.adapter import Adapter

    if isinstance(source, Adapter):
        return "adapter"
    if isinstance(source, torch.export.ExportedProgram):
        return "program"
    if isinstance(source, torch.nn.Module):
        return "module"
    raise UsageError(
        "source: expected a module, an ExportedProgram, an ONNX model, an Adapter, a path or a name, found "
        f"{type(source).__name__}"
    )


def _origin(
    kind: str,
    source: Any,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    dtype: str | None,
    weights: Any,
    device: str,
) -> _Origin:
    if kind != "module" and (example_inputs is not None or example_kwargs is not None):
        raise UsageError("example_inputs: for modules; the source here brings its own")
    if kind in ("program", "pt2"):
        if dtype is not None:
            raise UsageError("dtype: an ExportedProgram has its dtypes already; convert the module and export it again")
        if kind == "pt2":
            from hasten.backends.program import load_program

            return _Origin(load_program(source), (), {}, dynamic_shapes, os.fspath(source))
        return _Origin(source, (), {}, dynamic_shapes, "ExportedProgram")
    if kind == "module":
        if not example_inputs and not example_kwargs:
            raise UsageError(
                f"a module is captured on examples: give example_inputs or example_kwargs for {type(source).__name__}"
            )
        module, args, kwargs = source, tuple(example_inputs or ()), dict(example_kwargs or {})
        if dtype is not None:
            module, args, kwargs = _converted(module, args, kwargs, dtype)
        return _Origin(module, args, kwargs, dynamic_shapes, type(source).__name__)
    return _registered(source, dynamic_shapes, dtype, weights, device)


def _registered(source: Any, dynamic_shapes: Any, dtype: str | None, weights: Any, device: str) -> _Origin:
    import torch

    from hasten.models.diffusers_dir import from_source, is_directory_source
    from hasten.models.registry import get

    if not isinstance(source, str):
        adapter = source
    else:
        adapter = from_source(source) if is_directory_source(source) else get(source, weights=weights)
    module, wanted = adapter.module(), getattr(torch, dtype or "float32")
    examples = {name: t.to(device) for name, t in adapter.example_inputs(dtype=wanted).items()}
    return _Origin(module.to(device, wanted), (), examples, dynamic_shapes, adapter.name, adapter.output_names)


def _converted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: str) -> tuple[Any, Any, Any]:
    """Convert a copy of the module, and its floating inputs; the caller's stay as they are."""
    import torch
    from torch.utils import _pytree

    wanted = getattr(torch, dtype)

    def convert(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return copy.deepcopy(module).to(wanted), _pytree.tree_map(convert, args), _pytree.tree_map(convert, kwargs)


def _refuse_without_runtime(target: Target) -> None:
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


def _refuse_for_onnx(
    target: Target, source: Any, dtype: Any, dynamic_shapes: Any, example_inputs: Any, example_kwargs: Any
) -> None:
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


def _check_dtype(dtype: str, target: Target) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    if reason := supports("Conv", dtype, target):
        raise UsageError(f"target {target}, dtype {dtype}: {reason}")


def _profile(spec: TensorSpec, tensor: torch.Tensor, dims: Mapping[str, tuple[int, int | None]]) -> Profile:
    """Sizes of a captured input: the bounds of its symbols, the example's between them."""
    from hasten.backends.shapes import evaluate

    low, high = [], []
    for size, here in zip(spec.shape, tensor.shape, strict=True):
        least = {name: bounds[0] for name, bounds in dims.items()}
        most = {name: bounds[1] for name, bounds in dims.items() if bounds[1] is not None}
        smallest, greatest = evaluate(size, least), evaluate(size, most)
        if smallest is None or greatest is None:
            raise UsageError(f"input {spec.name!r}: size {size} has no upper bound; give its Dim a max")
        low.append(min(smallest, here))
        high.append(max(greatest, here))
    return Profile(tuple(low), tuple(tensor.shape), tuple(high))


def _merge(report: Report, later: Report) -> None:
    """Continue a torch graph's report with what legalising its export did."""
    for rule in later.rules:
        report.add(rule)
    report.ops_after = later.ops_after
    report.notes.extend(later.notes)
    for stage, seconds in later.seconds.items():
        report.seconds[stage] = report.seconds.get(stage, 0.0) + seconds


def _versions(runtime: Mapping[str, str]) -> dict[str, str]:
    from importlib.metadata import version

    import hasten

    return {"hasten": hasten.__version__, "torch": version("torch"), "onnx": version("onnx"), **runtime}
