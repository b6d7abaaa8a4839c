"""A built engine: loaded from its directory, called with named arrays.

Compiled engines do not look at what they are given: a wrong shape, dtype or stride is read as if it were right. So
every call is checked against the manifest first, and nothing is ever cast or reshaped without being asked.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.backends.decoder import NAME, part_of
from hasten.backends.manifest import Dim, Manifest, TensorSpec, read_manifest
from hasten.backends.shapes import evaluate, format_shape, multiple
from hasten.backends.target import Target, parse_target
from hasten.errors import HastenError, UsageError, nearest

if TYPE_CHECKING:
    import torch

    from hasten.backends.cached_run import CachedRun

Array = npt.NDArray[Any]


class Runner(Protocol):
    """What runs an artifact: lists in the manifest's order; the inputs are contiguous and checked."""

    def run_torch(self, inputs: list[torch.Tensor], /) -> list[torch.Tensor]: ...

    def run_numpy(self, inputs: list[Array], /) -> list[Array]: ...


class Engine:
    """Call it with one keyword argument per input; it returns a dict of outputs, torch or numpy as the inputs were.

    ``check_inputs`` (an attribute) looks for NaN and +infinity in floating inputs; -infinity passes, masks are made
    of it. Names, ranks, sizes, dtypes and devices are always checked.
    """

    def __init__(self, path: Path, manifest: Manifest, runner: Runner, *, check_inputs: bool = True) -> None:
        self.path = path
        self.manifest = manifest
        self.check_inputs = check_inputs
        self._runner = runner
        self._carried = {state["name"] for state in manifest.state}
        self._programs: dict[str, Engine] = {}

    @property
    def target(self) -> Target:
        return parse_target(self.manifest.target)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.outputs

    @property
    def report(self) -> Mapping[str, Any]:
        """The build's `Report` as a dict."""
        return self.manifest.report

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs of an engine with a step cache, the main one first; empty for any other engine."""
        return tuple(self.manifest.cache["programs"]) if self.manifest.cache is not None else ()

    def program(self, name: str) -> Engine:
        """One of `programs`, or a sampler's ``decoder``, as an engine of its own."""
        return self._programs[name]

    def start(
        self,
        steps: int | None = None,
        *,
        threshold: float | None = None,
        limit: int | None = None,
        mask: str | Sequence[int] | None = None,
    ) -> CachedRun:
        """Begin a run of ``steps`` calls with the engine's step cache; see `CachedRun`."""
        from hasten.backends.cached_run import CachedRun

        if self.manifest.loop is not None:
            raise UsageError(f"engine {self.path.name!r} holds a whole sampler; run it with hasten.sampler(engine)")
        if self.manifest.cache is None:
            raise UsageError(f"engine {self.path.name!r} has no step cache; build it with a cache, or call it")
        return CachedRun(self, steps, threshold=threshold, limit=limit, mask=mask)

    def __repr__(self) -> str:
        def side(specs: Sequence[TensorSpec]) -> str:
            return ", ".join(f"{t.name}: {t.dtype}{format_shape(t.shape)}" for t in specs)

        return f"Engine({self.path.name!r}, {self.manifest.target}, {side(self.inputs)} -> {side(self.outputs)})"

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Run once. Raises `UsageError` with what was expected and found for an input that does not fit."""
        if isinstance(self._runner, _NoGpu):
            raise HastenError(self._runner.reason)
        arrays = self._by_name(inputs)
        names = [t.name for t in self.outputs]
        if _is_numpy(arrays, self.path.name):
            self._check_numpy(arrays)
            ready = [np.ascontiguousarray(a) if a.ndim else a for a in arrays.values()]
            return dict(zip(names, self._runner.run_numpy(ready), strict=True))
        self._check_torch(arrays)
        tensors = [t.detach().contiguous() for t in arrays.values()]
        return dict(zip(names, self._runner.run_torch(tensors), strict=True))

    def _by_name(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = [t.name for t in self.inputs]
        for name, value in inputs.items():
            if name in self.manifest.constants:
                frozen = self.manifest.constants[name]
                if type(value) is not type(frozen) or value != frozen:
                    raise UsageError(
                        f"engine {self.path.name!r}: {name!r} was frozen to {frozen!r} when the engine was built, "
                        f"{value!r} given; build another engine for it"
                    )
            elif name not in names:
                raise UsageError(
                    f"engine {self.path.name!r}: there is no input {name!r}; inputs: {', '.join(names)}."
                    f"{nearest(name, names)}"
                )
        for name in names:
            if name not in inputs:
                raise UsageError(f"engine {self.path.name!r}: input {name!r} is missing; inputs: {', '.join(names)}")
        return {name: inputs[name] for name in names}

    def _check_numpy(self, arrays: dict[str, Array]) -> None:
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype == "bfloat16":
                raise self._unfit(spec, "is bfloat16, which numpy does not have; call the engine with torch tensors")
        self._check(arrays, {name: str(a.dtype) for name, a in arrays.items()})
        for spec in self.inputs:
            array = arrays[spec.name]
            if array.dtype.kind == "f":
                self._check_finite(spec, array)

    def _check_torch(self, tensors: dict[str, torch.Tensor]) -> None:
        device = self.target.device
        self._check(tensors, {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()})
        for spec in self.inputs:
            tensor = tensors[spec.name]
            if tensor.device.type != device:
                raise self._unfit(spec, f"expected on {device}, found on {tensor.device}")
            if tensor.is_floating_point():
                # torch's threads would look at a large tensor, and then spin on the processors that the engine wants
                by_numpy = device == "cpu" and spec.dtype in ("float32", "float64")
                self._check_finite(spec, tensor.numpy(force=True) if by_numpy else tensor)

    def _check_finite(self, spec: TensorSpec, array: Any) -> None:
        if not self.check_inputs or spec.name in self._carried:
            return
        below = array < np.inf
        if not bool(below.all()):
            found = f"{int((~below).sum())} of {math.prod(array.shape)} values are NaN or infinity"
            raise self._unfit(spec, f"{found}; check_inputs=False lets them pass")

    def _check(self, arrays: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
        symbols: dict[str, int] = {}
        bound_by: dict[str, str] = {}
        for spec in self.inputs:
            shape = tuple(arrays[spec.name].shape)
            if dtypes[spec.name] != spec.dtype:
                raise self._unfit(spec, f"expected {spec.dtype}, found {dtypes[spec.name]}; convert it first")
            if len(shape) != len(spec.shape):
                raise self._unfit(
                    spec,
                    f"expected {len(spec.shape)} dimensions {format_shape(spec.shape)}, found {len(shape)}: "
                    f"{format_shape(shape)}",
                )
            for axis, (expected, found) in enumerate(zip(spec.shape, shape, strict=True)):
                self._check_size(spec, axis, expected, found, symbols, bound_by)
        for spec in self.inputs:  # expressions, now that every symbol that an input names is bound
            for axis, (expected, found) in enumerate(zip(spec.shape, arrays[spec.name].shape, strict=True)):
                if (size := evaluate(expected, symbols)) is not None and size != found:
                    raise self._unfit(spec, f"dimension {axis} is {found}, expected {expected} = {size}")

    def _check_size(
        self, spec: TensorSpec, axis: int, expected: Dim, found: int, symbols: dict[str, int], bound_by: dict[str, str]
    ) -> None:
        if isinstance(expected, int):
            if found != expected:
                raise self._unfit(
                    spec, f"dimension {axis} is {found}, expected {expected} of {format_shape(spec.shape)}"
                )
            return
        if (scaled := multiple(expected)) is not None:
            factor, expected = scaled
            if found % factor:
                raise self._unfit(spec, f"dimension {axis} is {found}, expected a multiple of {factor}")
            found //= factor
        if expected not in self.manifest.dims:
            return  # an expression: looked at when all symbols are bound
        low, high = self.manifest.dims[expected]
        if found < low or (high is not None and found > high):
            bounds = f"{low} to {high}" if high is not None else f"{low} or more"
            raise self._unfit(spec, f"dimension {axis} ({expected}) is {found}, expected {bounds}")
        if symbols.setdefault(expected, found) != found:
            raise self._unfit(
                spec,
                f"dimension {axis} ({expected}) is {found}, and {symbols[expected]} in input {bound_by[expected]!r}",
            )
        bound_by.setdefault(expected, spec.name)

    def _unfit(self, spec: TensorSpec, reason: str) -> UsageError:
        side = "input" if spec in self.inputs else "output"
        return UsageError(f"engine {self.path.name!r}, {side} {spec.name!r}: {reason}")


def load(path: str | os.PathLike[str], *, check_inputs: bool = True, threads: int | None = None) -> Engine:
    """Open an engine directory; `HastenError` with the reason if it is changed, foreign or cannot run here.

    ``threads`` bounds the threads of an ONNX Runtime engine; the other runtimes share torch's. An engine for a GPU
    loads on a machine without one, so that its manifest can be read, and says so when it is called.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    target = parse_target(manifest.target)
    if threads is not None and target.backend != "onnxruntime":
        raise UsageError(f"threads: an option of onnxruntime engines; {directory.name!r} is for {target}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads: {threads} given; give 1 or more")
    if target.device == "cuda" and not _has_gpu():
        return Engine(directory, manifest, _NoGpu(directory.name, target), check_inputs=check_inputs)
    engine = Engine(directory, manifest, _runner(directory, manifest, target, threads), check_inputs=check_inputs)
    for name, part in _parts(manifest):
        runner = engine._runner if part == manifest else _runner(directory, part, target, threads)
        engine._programs[name] = Engine(directory, part, runner, check_inputs=check_inputs)
    return engine


def _parts(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The programs beside a sampler's loop or of a step cache, each with a manifest of its own."""
    if (decoder := part_of(manifest)) is not None:
        yield NAME, decoder
    if manifest.cache is None:
        return
    for name, part in manifest.cache["programs"].items():
        yield name, manifest.program(part)


def _runner(directory: Path, manifest: Manifest, target: Target, threads: int | None) -> Runner:
    artifact = directory / manifest.artifact
    if target.backend == "aoti":
        from hasten.backends.inductor import PackageRunner

        return PackageRunner(artifact, manifest)
    if target.backend == "onnxruntime":
        from hasten.backends.onnxruntime import SessionRunner

        return SessionRunner(artifact, manifest, target.device, threads=threads)
    if target.backend in ("tensorrt", "tensorrt-rtx"):
        from hasten.backends.tensorrt import PlanRunner

        return PlanRunner(artifact, manifest, target)
    if target.backend == "torch-tensorrt":
        from hasten.backends.torch_tensorrt import ProgramRunner

        return ProgramRunner(artifact, manifest)
    raise HastenError(f"engine '{directory}': {target} has no engines on disk")


class _NoGpu:
    """Stands in for the runner of a GPU engine on a machine without a GPU."""

    def __init__(self, name: str, target: Target) -> None:
        self.reason = f"engine {name!r} ({target}) needs an NVIDIA GPU, and torch finds none here"

    def run_torch(self, inputs: list[torch.Tensor], /) -> list[torch.Tensor]:
        raise HastenError(self.reason)

    def run_numpy(self, inputs: list[Array], /) -> list[Array]:
        raise HastenError(self.reason)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_numpy(arrays: Mapping[str, Any], name: str) -> bool:
    """Tell numpy arrays (True) from torch tensors; anything else, and a mixture, is refused."""
    kinds: dict[str, str] = {}
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray) and not _is_tensor(value):
            raise UsageError(
                f"engine {name!r}, input {key!r}: expected a torch tensor or numpy array, found {type(value).__name__}"
            )
        kinds[key] = "numpy" if isinstance(value, np.ndarray) else "torch"
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{key}: {kind}" for key, kind in kinds.items())
        raise UsageError(f"engine {name!r}: inputs must be all torch or all numpy, found {found}")
    return "numpy" in kinds.values()


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
