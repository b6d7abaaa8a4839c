"""An ONNX model with a step cache: its programs, what a caller keeps, and the sizes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.backends.fold import signal_in_onnx
from hasten.backends.manifest import TensorSpec
from hasten.backends.onnx_signature import Signature, signature
from hasten.backends.shapes import Profile, bound, evaluate
from hasten.backends.step_cache import Caching, is_static

if TYPE_CHECKING:
    import onnx

    from hasten.passes.onnx.step_cache import StateTensor
    from hasten.passes.rule import Report


@dataclass(frozen=True)
class CachedModel:
    """The programs by name, the main one first, the state as the manifest has it, and what was done."""

    programs: Mapping[str, onnx.ModelProto]
    state: tuple[Mapping[str, Any], ...]
    described: Mapping[str, Any]


def with_cache(caching: Caching, model: onnx.ModelProto, sizes: Mapping[str, int], report: Report) -> CachedModel:
    """Find the region in ``model`` and cut it, in place; ``sizes`` are those of the symbols, for the state's bytes.

    What a symbol is not told for counts as 1.
    """
    from hasten.backends.region import find_cut_onnx
    from hasten.passes.onnx import step_cache

    caching.check_fits(report.source, signature(model).inputs)
    step_cache.require_opset(model)
    found = find_cut_onnx(model, caching.policy, caching.region)
    caching = caching.folded(found, lambda: signal_in_onnx(model, found, _time_sizes(model, found.time, sizes)))
    if caching.network_form == "conditional":
        cached = step_cache.conditional(model, found.cut, caching.policy)
    else:
        cached = step_cache.straight(model, found.cut, caching.policy, static=is_static(caching.policy))
    state = tuple(_state(t, sizes) for t in cached.state)
    described = caching.describe(found, sum(s["bytes"] for s in state), report)
    return CachedModel({name: p.model for name, p in cached.programs.items()}, state, described)


def _time_sizes(model: onnx.ModelProto, name: str | None, sizes: Mapping[str, int]) -> list[int]:
    (given,) = (spec for spec in signature(model).inputs if spec.name == name)
    return [evaluate(size, sizes) or 1 for size in given.shape]


def take_sizes(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Give values their symbolic sizes back where rewriting could not keep them: arithmetic on inputs' sizes."""
    known = {v.name: v.type.tensor_type.shape.dim for v in original.graph.value_info}
    for value in model.graph.value_info:
        dims, before = value.type.tensor_type.shape.dim, known.get(value.name, ())
        if len(dims) != len(before):
            continue
        for dim, other in zip(dims, before, strict=True):
            if other.dim_param and not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = other.dim_param


def profiles_of(found: Signature, own: Mapping[str, Profile], inputs: tuple[TensorSpec, ...]) -> dict[str, Profile]:
    """Profiles of ``inputs``, state among them; ``own`` are those of the model's own inputs, which ``found`` has."""
    low, opt, high = (_sizes(found, {name: p[i] for name, p in own.items()}) for i in range(3))
    made = dict(own)
    for spec in inputs:
        shapes = [[evaluate(size, sizes) for size in spec.shape] for sizes in (low, opt, high)]
        if spec.name not in made and all(size is not None for shape in shapes for size in shape):
            made[spec.name] = Profile(*(tuple(size for size in shape if size is not None) for shape in shapes))
    return made


def _sizes(found: Signature, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec in found.inputs:
        if spec.name in shapes:
            sizes |= bound(spec.shape, shapes[spec.name])
    return sizes


def sizes_of(found: Signature, profiles: Mapping[str, Profile]) -> dict[str, int]:
    """The most frequent size of every symbol, 1 where none is given."""
    return {**dict.fromkeys(found.dims, 1), **_sizes(found, {name: p.opt for name, p in profiles.items()})}


def _state(tensor: StateTensor, sizes: Mapping[str, int]) -> dict[str, Any]:
    from hasten.passes.onnx.element import numpy_type

    spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
    numbers = [evaluate(size, sizes) or 1 for size in tensor.shape]
    return {
        **spec.as_dict(),
        "start": tensor.start,
        "bytes": prod(numbers) * np.dtype(numpy_type(tensor.dtype)).itemsize,
    }
