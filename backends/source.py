"""What `build` can start from: which kind of thing it is, and a PyTorch source made ready to be captured."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import UsageError

_FILES = {".onnx": "onnx", ".onnxtxt": "onnx", ".pt2": "pt2"}


@dataclass(frozen=True)
class Origin:
    """A PyTorch source: what is captured on which examples. ``output_names`` None: as the forward names them."""

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    name: str
    output_names: tuple[str, ...] | None = None


def kind_of(source: Any, weights: Any = None) -> str:
    """Tell ``onnx``, ``module``, ``program``, ``pt2``, ``adapter`` and ``name`` apart, or raise `UsageError`."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        kind = _FILES.get(Path(text).suffix, "name")
        if kind != "name" and not Path(text).is_file():
            raise UsageError(f"source '{text}': there is no such file")
    else:
        kind = _kind_of_object(source)
    if weights is not None and kind != "name":
        raise UsageError("weights: for registered models; the source here brings its own")
    return kind


def _kind_of_object(source: Any) -> str:
    import onnx
    import torch

    from hasten.models.adapter import Adapter

    kinds = {
        "onnx": onnx.ModelProto,
        "adapter": Adapter,
        "program": torch.export.ExportedProgram,
        "module": torch.nn.Module,
    }
    for kind, wanted in kinds.items():
        if isinstance(source, wanted):
            return kind
    raise UsageError(
        "source: expected a module, an ExportedProgram, an ONNX model, an Adapter, a path or a name, found "
        f"{type(source).__name__}"
    )


def origin_of(
    kind: str,
    source: Any,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    dtype: str | None,
    weights: Any,
    device: str,
) -> Origin:
    """Make a PyTorch source ready; a registered model is put on ``device``, everything else stays where it is."""
    if kind != "module" and (example_inputs is not None or example_kwargs is not None):
        raise UsageError("example_inputs: for modules; the source here brings its own")
    if kind in ("program", "pt2"):
        if dtype is not None:
            raise UsageError("dtype: an ExportedProgram has its dtypes already; convert the module and export it again")
        if kind == "pt2":
            from hasten.backends.program import load_program

            return Origin(load_program(source), (), {}, dynamic_shapes, os.fspath(source))
        return Origin(source, (), {}, dynamic_shapes, "ExportedProgram")
    if kind == "module":
        name = type(source).__name__
        if not example_inputs and not example_kwargs:
            raise UsageError(f"a module is captured on examples: give example_inputs or example_kwargs for {name}")
        module, args, kwargs = source, tuple(example_inputs or ()), dict(example_kwargs or {})
        if dtype is not None:
            module, args, kwargs = _converted(module, args, kwargs, dtype)
        return Origin(module, args, kwargs, dynamic_shapes, name)
    return _registered(source, dynamic_shapes, dtype, weights, device)


def _registered(source: Any, dynamic_shapes: Any, dtype: str | None, weights: Any, device: str) -> Origin:
    import torch

    from hasten.models.diffusers_dir import from_source, is_directory_source
    from hasten.models.registry import get

    adapter = source
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        adapter = from_source(text) if is_directory_source(text) else get(text, weights=weights)
    wanted = getattr(torch, dtype or "float32")
    module = adapter.module(wanted).to(device)
    examples = {name: t.to(device) for name, t in adapter.example_inputs(dtype=wanted).items()}
    return Origin(module, (), examples, dynamic_shapes, adapter.name, adapter.output_names)


def _converted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: str) -> tuple[Any, Any, Any]:
    """Convert a copy of the module, and its floating inputs; the caller's stay as they are."""
    import torch
    from torch.utils import _pytree

    wanted = getattr(torch, dtype)

    def convert(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return copy.deepcopy(module).to(wanted), _pytree.tree_map(convert, args), _pytree.tree_map(convert, kwargs)
