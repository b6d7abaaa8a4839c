"""What a sampler's call is given, read and checked: tensors, arrays and lists, numbers, seeds and generators."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.backends.shapes import format_shape
from hasten.errors import UsageError
from hasten.passes.solvers.seeds import check_seed

if TYPE_CHECKING:
    import torch


def tensor(what: str, value: Any) -> torch.Tensor:
    """A tensor of a tensor, an array, or numbers in lists; their type is kept, and no engine converts it."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic, list, tuple, int, float)):
        try:
            # a copy of an array: torch warns of those that cannot be written to, and takes no negative strides
            return torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise UsageError(
        f"{what}: {type(value).__name__} given, which cannot be read as one tensor of numbers; give a torch tensor, a "
        "numpy array, or a list of numbers"
    )


def tensors(given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`tensor` of each."""
    return {name: tensor(name, value) for name, value in given.items()}


def number(what: str, value: Any, low: float, high: float = math.inf) -> float:
    """A finite number from ``low`` to ``high``."""
    bounds = f"a finite number from {low:g} up" if high == math.inf else f"a number from {low:g} to {high:g}"
    try:
        found = None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None:
        shown = repr(value) if isinstance(value, str) else type(value).__name__
        raise UsageError(f"{what}: {shown} given, which is not one number; give {bounds}")
    if not low <= found <= high or math.isinf(found):
        raise UsageError(f"{what}: {found:g} given; give {bounds}")
    return found


def whole(what: str, value: Any, low: int = 1) -> int:
    """A whole number from ``low`` up."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{what}: {value!r} is not a whole number; give {low} or more")
    found = operator.index(value)
    if found < low:
        raise UsageError(f"{what}: {found} given; give {low} or more")
    return found


def seeds(seed: Any) -> int | tuple[int, ...]:
    """One seed, or one for each picture; None draws one from torch's own generator, as diffusers does without any."""
    import torch

    if seed is None:
        return int(torch.randint(2**62, ()))
    if isinstance(seed, (list, tuple)):
        return tuple(check_seed(s) for s in seed)
    return check_seed(seed)


def generators(generator: Any) -> Any:
    """One `torch.Generator`, a list of them, or None."""
    import torch

    many = list(generator) if isinstance(generator, Sequence) and not isinstance(generator, str) else [generator]
    for one in many:
        if one is not None and not isinstance(one, torch.Generator):
            raise UsageError(
                f"generator: {one!r} is no torch.Generator; give one, or a list of one for each picture, or a seed"
            )
    return generator


def fits(what: str, given: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``given`` in float32; `UsageError` where it has not the sizes of the run's latents."""
    if tuple(given.shape) != shape:
        raise UsageError(
            f"{what} is {tuple(given.shape)}, and the engine makes {shape}; give that, or build another engine"
        )
    return given.detach().float()


def part_of_picture(given: torch.Tensor, latents: tuple[int, ...]) -> torch.Tensor:
    """A mask for pictures of ``latents``' sizes, (B, 1, ...) float32 from 0 (stays) to 1 (is made anew)."""
    wanted = (latents[0], 1, *latents[2:])
    if tuple(given.shape) != wanted:
        raise UsageError(
            f"mask_image is {format_shape(tuple(given.shape))}, and the engine takes {format_shape(wanted)}; give that"
        )
    mask = given.detach().float()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise UsageError("mask_image has values outside 0 to 1; give 0 where the picture stays and 1 where it is made")
    return mask


def classes(given: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> None:
    """Refuse a class that the network does not have; ``counts`` is how many it has, by the input's name."""
    for name, count in counts.items():
        if name not in given or given[name].is_floating_point():
            continue
        if bool(((given[name] < 0) | (given[name] >= count)).any()):
            wrong = given[name][(given[name] < 0) | (given[name] >= count)].flatten()[0]
            raise UsageError(f"{name}: class {int(wrong)} given; the network has classes from 0 to {count - 1}")
