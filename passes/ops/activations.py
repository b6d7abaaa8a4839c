"""The activations that fused operators apply, as plain torch operators.

``gelu_tanh`` is written with a sigmoid, 0.5 (1 + tanh u) = sigmoid(2u): the same function, but Inductor's C++ code for
tanh is about four times as slow as the one for exp, and the left tail loses no digits to 1 + tanh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UsageError, nearest

_TWO_ROOT = 2.0 * math.sqrt(2.0 / math.pi)


def gelu_tanh(x: Tensor) -> Tensor:
    """``F.gelu(x, approximate="tanh")`` without a tanh."""
    return x * torch.sigmoid(x * (_TWO_ROOT + (0.044715 * _TWO_ROOT) * (x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    """X * sigmoid(1.702 x), the activation CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"none": lambda x: x, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}
)


def activation(name: str, *, operator: str) -> Callable[[Tensor], Tensor]:
    """The function of that name, or a `UsageError` that lists the names."""
    if name not in ACTIVATIONS:
        raise UsageError(
            f"{operator}: unknown activation {name!r}; use one of {', '.join(ACTIVATIONS)}.{nearest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
