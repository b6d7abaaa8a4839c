"""The sizes of one run of a sampler's engine: its own, or, where it was built for a range, those of what is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.backends.manifest import Dim
from hasten.backends.shapes import bound, evaluate, format_shape
from hasten.errors import UsageError

if TYPE_CHECKING:
    import torch


def sizes_of(
    specs: Mapping[str, Sequence[Dim]], given: Mapping[str, torch.Tensor | None], pictures: int | None
) -> dict[str, int]:
    """The values of the symbols in ``specs`` (name -> sizes), read off the tensors given under these names.

    ``pictures`` is their number where that is said otherwise. `UsageError` where two tensors say different things.
    """
    found: dict[str, int] = {}
    said: dict[str, str] = {}
    for name, tensor in given.items():
        if tensor is None or name not in specs or len(specs[name]) != tensor.ndim:
            continue
        for symbol, size in bound(specs[name], tuple(tensor.shape)).items():
            if found.setdefault(symbol, size) != size:
                raise UsageError(
                    f"{name!r} is {format_shape(tuple(tensor.shape))}, which makes {symbol} {size}, and "
                    f"{said[symbol]!r} makes it {found[symbol]}; give them one size"
                )
            said.setdefault(symbol, name)
    if pictures is not None and isinstance(first := specs["latents"][0], str):
        found.setdefault(first, pictures)
    return found


def sized(shape: Sequence[Any], sizes: Mapping[str, int], what: str) -> tuple[int, ...]:
    """``shape`` in numbers; `UsageError` where a size does not follow from ``sizes``."""
    numbers = [evaluate(size, sizes) for size in shape]
    if None in numbers:
        raise UsageError(
            f"{what} is {format_shape(tuple(shape))} in this engine, and nothing that was given says how large "
            f"{shape[numbers.index(None)]} is; give latents"
        )
    return tuple(n for n in numbers if n is not None)
