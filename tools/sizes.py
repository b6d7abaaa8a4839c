"""``--shapes`` for a named model: another size of its example inputs, or a range that the engine then accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hasten.backends.shapes import Profile, format_shape
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    from hasten.models.adapter import Adapter


def sized(adapter: Adapter, profiles: Mapping[str, Profile]) -> tuple[Adapter, dict[str, dict[int, Any] | None] | None]:
    """``adapter`` with examples of the optimal sizes, and the dynamic shapes where min and max differ.

    Raises `UsageError` for an input that does not exist and for an axis whose size the model fixes.
    """
    known = {i.name: i for i in adapter.inputs}
    for name, profile in profiles.items():
        if name not in known:
            raise UsageError(
                f"shapes: {adapter.name} has no input {name!r}; inputs: {', '.join(known)}.{nearest(name, known)}"
            )
        _check(adapter, name, profile)
    sizes: dict[str, int] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for name, profile in profiles.items():
        for axis, label in known[name].dims.items():
            size = profile.opt[axis]
            if sizes.setdefault(label, size) != size:
                raise UsageError(f"shapes: size {label!r} is {sizes[label]} in one input and {size} in {name!r}")
            if profile.min[axis] != profile.max[axis]:
                ranges[label] = (profile.min[axis], profile.max[axis])
    for label, size in sizes.items():
        if size % (multiple := adapter.multiples.get(label, 1)):
            raise UsageError(f"shapes: {label} of {adapter.name} must be a multiple of {multiple}; {size} given")
    inputs = tuple(
        replace(i, shape=tuple(sizes.get(i.dims.get(axis, ""), size) for axis, size in enumerate(i.shape)))
        for i in adapter.inputs
    )
    changed = replace(adapter, inputs=inputs, batch=sizes.get("batch", adapter.batch))
    if not ranges:
        return changed, None
    dims = {label: _dim(adapter, label, *bounds) for label, bounds in ranges.items()}
    return changed, {i.name: {axis: dims[n] for axis, n in i.dims.items() if n in dims} or None for i in inputs}


def _check(adapter: Adapter, name: str, profile: Profile) -> None:
    given = next(i for i in adapter.inputs if i.name == name)
    if len(profile.opt) != len(given.shape):
        raise UsageError(
            f"shapes: input {name!r} of {adapter.name} has {len(given.shape)} dimensions {format_shape(given.shape)}, "
            f"{len(profile.opt)} given"
        )
    for axis, size in enumerate(given.shape):
        wrong = next((shape[axis] for shape in profile if shape[axis] != size), None)
        if axis not in given.dims and wrong is not None:
            raise UsageError(
                f"shapes: input {name!r} of {adapter.name}, dimension {axis} is fixed to {size}, {wrong} given"
            )


def _dim(adapter: Adapter, label: str, low: int, high: int) -> Any:
    """A size that must be a multiple is spelled as one, so both bounds must be."""
    from torch.export import Dim

    multiple = adapter.multiples.get(label, 1)
    if label == "batch" or multiple == 1:
        return Dim(label, min=low, max=high)
    if low % multiple or high % multiple:
        raise UsageError(f"shapes: {label} of {adapter.name} must be a multiple of {multiple}; {low} to {high} given")
    return multiple * Dim(f"{label}_by_{multiple}", min=low // multiple, max=high // multiple)
