"""Random weights from a fixed seed, such that every output depends on every input.

diffusers leaves some layers at zero (the gates of adaLN-zero, some output projections), and a model that starts from
them computes nothing. Here every parameter is drawn anew, from a generator seeded by its name: neither the order of
construction nor the version of a package changes a value.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """What `torch.nn.init` would write into a parameter is left out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__module__", None) == "torch.nn.init" and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def filled(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`fill` what ``make`` builds, which draws nothing itself: of a large model that takes as long as filling it."""
    with _Undrawn():
        model = make()
    return fill(model, seed, dtype)


def fill(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Draw all parameters, in float32, and leave them in ``dtype``; returns the model.

    Matrices and kernels have unit gain (normal with variance 1 / fan-in), norms scale by about 1, biases are small.
    """
    named = [(p, o, n, w) for p, o in model.named_modules() for n, w in o.named_parameters(recurse=False)]
    once = {id(parameter): (path, owner, name, parameter) for path, owner, name, parameter in named}
    own = threading.local()  # memory that is touched for the first time costs more than the numbers in it

    def draw(path: str, owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if parameter.dtype == dtype:
            _draw(path, owner, name, parameter.detach(), seed)
            return
        if getattr(own, "room", None) is None:
            own.room = torch.empty(max(p.numel() for _, _, _, p in once.values()))
        drawn = own.room[: parameter.numel()].view(parameter.shape)
        _draw(path, owner, name, drawn, seed)
        parameter.data = drawn.to(dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # a generator draws on one thread
        for drawn in [threads.submit(draw, *which) for which in once.values()]:
            drawn.result()
    return model


def _draw(path: str, owner: nn.Module, name: str, values: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{path}.{name}:{seed}".encode()))
    values.normal_(generator=generator)
    if values.ndim >= 2:
        values.mul_(values[0].numel() ** -0.5)
    elif name == "bias":
        values.mul_(0.05)
    elif "Norm" in type(owner).__name__:
        values.mul_(0.1).add_(1)
