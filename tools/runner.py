"""Anything that can be run: a module, a .pt2 file, an ONNX model, an engine. Named torch tensors in and out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.backends.manifest import TensorSpec
from hasten.backends.shapes import Shape, bound, check_profiles, evaluate, multiple, parse_profiles
from hasten.errors import HastenError, UsageError, nearest
from hasten.tools.source import ENGINE, MODEL, ONNX, Source

if TYPE_CHECKING:
    import onnx
    import torch

Tensors = dict[str, Any]
"""Tensors by name."""
USUAL = {0: 2}
"""A symbolic size of axis 0 is a batch of two, unless that is out of bounds; every other one is `SIDE`."""
SIDE = 16


@dataclass(frozen=True)
class Runner:
    """``run`` takes every input by name. ``examples(seed, batch)`` gives inputs that make sense to it, or None.

    ``dims`` bounds the symbols in the shapes.
    """

    label: str
    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    call: Callable[[Tensors], Tensors]
    dims: Mapping[str, tuple[int, int | None]]
    examples: Callable[[int, int | None], Tensors] | None = None

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; `UsageError` for a name that is missing or unknown."""
        names = [t.name for t in self.inputs]
        for name in inputs:
            if name not in names:
                raise UsageError(
                    f"{self.label}: there is no input {name!r}; inputs: {', '.join(names)}.{nearest(name, names)}"
                )
        for name in names:
            if name not in inputs:
                raise UsageError(f"{self.label}: input {name!r} is missing; inputs: {', '.join(names)}")
        return self.call({name: inputs[name] for name in names})


def open_runner(source: Source) -> Runner:
    """Make a source ready to run; a model and a .pt2 file run eagerly, an ONNX file in ONNX Runtime on the CPU."""
    if source.kind == ENGINE:
        return engine_runner(source)
    if source.kind == ONNX:
        from hasten.passes.onnx import io

        return onnx_runner(io.read(source.path).model, source.text)
    return _model_runner(source) if source.kind == MODEL else _program_runner(source)


def engine_runner(source: Source) -> Runner:
    """Run an engine directory. Examples are those of the model that it was built from, where that is a named one."""
    from hasten.backends.engine import load

    engine = load(source.path)
    device = engine.target.device

    def call(inputs: Tensors) -> Tensors:
        made = engine(**{name: tensor.to(device) for name, tensor in inputs.items()})
        return {name: tensor.cpu() for name, tensor in made.items()}

    return Runner(
        source.text,
        ENGINE,
        engine.inputs,
        engine.outputs,
        call,
        engine.manifest.dims,
        _examples_of(str(engine.report.get("source", "")), engine.inputs),
    )


def onnx_runner(model: onnx.ModelProto, label: str) -> Runner:
    """Run a model in ONNX Runtime on the CPU."""
    import onnxruntime
    import torch

    from hasten.backends.onnx_signature import signature

    found = signature(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = _session(onnxruntime, model, options)
    except Exception as error:
        raise HastenError(f"ONNX Runtime cannot run {label}: {' '.join(str(error).split())}") from error

    def call(inputs: Tensors) -> Tensors:
        feed = {}
        for spec in found.inputs:
            given = str(inputs[spec.name].dtype).removeprefix("torch.")
            if given != spec.dtype:
                raise UsageError(f"{label}, input {spec.name!r}: expected {spec.dtype}, found {given}")
            feed[spec.name] = inputs[spec.name].numpy()
        try:
            made = session.run([t.name for t in found.outputs], feed)
        except Exception as error:
            raise HastenError(f"ONNX Runtime failed to run {label}: {' '.join(str(error).split())}") from error
        return {t.name: torch.from_numpy(a) for t, a in zip(found.outputs, made, strict=True)}

    return Runner(label, ONNX, found.inputs, found.outputs, call, found.dims)


def _session(onnxruntime: Any, model: onnx.ModelProto, options: Any) -> Any:
    """Large models go through a file: a message in memory ends at 2 GB."""
    import tempfile
    from pathlib import Path

    from hasten.passes.onnx import io

    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        path = Path(folder) / "model.onnx"
        io.write(model, path)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _model_runner(source: Source) -> Runner:
    import torch

    adapter = source.adapter()
    module = adapter.module()
    example = adapter.example_inputs()

    def call(inputs: Tensors) -> Tensors:
        with torch.no_grad():
            made = module(**inputs)
        made = (made,) if isinstance(made, torch.Tensor) else tuple(made)
        return dict(zip(adapter.output_names, made, strict=True))

    def examples(seed: int, batch: int | None) -> Tensors:
        return adapter.example_inputs(batch, seed)

    inputs = []
    dims: dict[str, tuple[int, int | None]] = {}
    for name, tensor in example.items():
        axes = adapter.dynamic_dims.get(name, {})
        shape = tuple(axes.get(axis, size) for axis, size in enumerate(tensor.shape))
        inputs.append(TensorSpec(name, _dtype(tensor), shape))
        dims.update(dict.fromkeys(axes.values(), (1, None)))
    outputs = tuple(TensorSpec(name, "float32", ()) for name in adapter.output_names)
    return Runner(source.text, MODEL, tuple(inputs), outputs, call, dims, examples)


def _program_runner(source: Source) -> Runner:
    import torch

    from hasten.backends.program import dim_names, flatten

    program = source.program()
    flat = flatten(program.module(check_guards=False), program, dim_names=dim_names(program, None))

    def call(inputs: Tensors) -> Tensors:
        with torch.no_grad():
            made = flat.module(*inputs.values())
        return {t.name: value for t, value in zip(flat.outputs, made, strict=True)}

    def examples(seed: int, batch: int | None) -> Tensors:
        return {t.name: v for t, v in zip(flat.inputs, flat.example_inputs, strict=True)}

    return Runner(source.text, source.kind, flat.inputs, flat.outputs, call, flat.dims, examples)


def _examples_of(name: str, inputs: tuple[TensorSpec, ...]) -> Callable[[int, int | None], Tensors] | None:
    """Examples of a named model if its inputs are called as the engine's; labels and times are not just any numbers."""
    from hasten.models.registry import get, names

    if name not in names():
        return None
    adapter = get(name)
    if [i.name for i in adapter.inputs] != [t.name for t in inputs]:
        return None
    dtypes = {t.name: t.dtype for t in inputs}

    def examples(seed: int, batch: int | None) -> Tensors:
        import torch

        made = adapter.example_inputs(batch, seed)
        return {n: v.to(getattr(torch, dtypes[n])) if v.is_floating_point() else v for n, v in made.items()}

    return examples


def random_inputs(runner: Runner, seed: int, shapes: Mapping[str, Shape] | None = None) -> Tensors:
    """Inputs for ``runner``: its own examples where they have the sizes that it takes and ``shapes`` asks for.

    Otherwise drawn by type.

    Floats are unit normal, integers 0 or 1 (any table has those rows), booleans mostly true.
    """
    check_profiles(parse_profiles(shapes or {}), runner.inputs)
    if runner.examples is not None:
        made = runner.examples(seed, _batch(runner, shapes or {}))
        asked = all(tuple(made[n].shape) == tuple(shape) for n, shape in (shapes or {}).items() if n in made)
        if asked and all(_fits(t, made[t.name]) for t in runner.inputs):
            return made
    import torch

    made = {}
    sizes = _sizes(runner, shapes or {})
    for spec in runner.inputs:
        shape = tuple(evaluate(d, sizes) or 1 for d in spec.shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}:{seed}".encode()))
        made[spec.name] = _draw(spec, shape, generator)
    return made


def _draw(spec: TensorSpec, shape: Shape, generator: Any) -> Any:
    import torch

    dtype = getattr(torch, spec.dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.3
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _batch(runner: Runner, shapes: Mapping[str, Shape]) -> int | None:
    """The size of axis 0 that is asked for, or that the runner insists on; None where any will do."""
    sizes = [shape[0] for shape in shapes.values() if shape]
    sizes += [spec.shape[0] for spec in runner.inputs if spec.shape and isinstance(spec.shape[0], int)]
    return sizes[0] if sizes else None


def _fits(spec: TensorSpec, tensor: Any) -> bool:
    same = len(spec.shape) == tensor.ndim and _dtype(tensor) == spec.dtype
    return same and all(not isinstance(d, int) or d == n for d, n in zip(spec.shape, tensor.shape, strict=True))


def _sizes(runner: Runner, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """A number for every symbol: from ``shapes`` where given."""
    sizes: dict[str, int] = {}
    for spec in runner.inputs:
        if spec.name in shapes:
            sizes.update(bound(spec.shape, shapes[spec.name]))
    for spec in runner.inputs:
        for axis, dim in enumerate(spec.shape):
            symbol = dim if dim in runner.dims else (multiple(dim) or (0, None))[1]
            if isinstance(symbol, str) and symbol not in sizes:
                low, high = runner.dims.get(symbol, (1, None))
                sizes[symbol] = max(low, min(USUAL.get(axis, SIDE), high or SIDE))
    return sizes


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
