"""A pure function of arrays as a small ONNX model, by way of torch's exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
import torch
from torch.utils import _pytree

from hasten.errors import HastenError
from hasten.passes.fx.to_onnx import onnx_from_graph
from hasten.passes.onnx.traced import Made, Value

_SIZES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)
"""What symbolic sizes are while a function is traced: no two alike, and none that broadcasts."""


class Exported(NamedTuple):
    """``model`` maps ``operands``, in their order, to what is new in the function's result.

    ``result`` is the function's result with something in place of each tensor: the operand itself where the function
    returned it untouched, else a `Made` with the example's sizes.
    """

    model: onnx.ModelProto
    operands: tuple[Value, ...]
    result: Any


def export(function: Callable[..., Any], *operands: Any, opset: int) -> Exported:
    """Trace ``function(*operands)``, where a `Value` stands for each tensor, and write it at ``opset``.

    Operands and result are pytrees. Symbolic sizes stay symbolic; equal names are equal sizes. Raises `HastenError`
    where the function does not fit its operands or has no ONNX form.
    """
    leaves, spec = _pytree.tree_flatten(operands, is_leaf=lambda leaf: isinstance(leaf, Value))
    values = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Value)))
    symbols = dict.fromkeys(size for v in values for size in v.shape if isinstance(size, str))
    if len(symbols) > len(_SIZES):
        raise HastenError(f"{len(symbols)} different symbolic sizes in one step cache; fix some of them")
    sizes: dict[Any, int] = dict(zip(symbols, _SIZES, strict=False))
    traced: list[Any] = []

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = dict(zip(values, tensors, strict=True))
        filled = [own[leaf] if isinstance(leaf, Value) else leaf for leaf in leaves]
        result = function(*_pytree.tree_unflatten(filled, spec))
        names: dict[int, Value | Made] = {id(tensor): value for value, tensor in own.items()}
        made = {id(t): t for t in _pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and id(t) not in names}
        names |= {key: _made(i, t) for i, (key, t) in enumerate(made.items())}
        traced[:] = [_pytree.tree_map(lambda leaf: names.get(id(leaf), leaf), result)]
        return tuple(made.values())

    # Never written to, so that large ones take no memory.
    examples = tuple(torch.empty([sizes.get(n, n) for n in v.shape], dtype=getattr(torch, v.dtype)) for v in values)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(v.shape) if isinstance(size, str)} or None
        for v in values
    )
    try:
        with torch.no_grad():
            program = torch.export.export(_Function(run), examples, dynamic_shapes=(dynamic,), strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{v.name} {v.dtype}[{', '.join(map(str, v.shape))}]" for v in values)
        raise HastenError(f"a step-cache function does not take {given}: {str(error).splitlines()[0]}") from error
    module = program.module(check_guards=False)
    if not program.graph_signature.user_outputs:
        return Exported(onnx.ModelProto(), (), traced[0])
    return Exported(onnx_from_graph(module, examples, opset, dynamic if any(dynamic) else None), values, traced[0])


class _Function(torch.nn.Module):
    def __init__(self, run: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.run(*tensors)


def _made(output: int, tensor: torch.Tensor) -> Made:
    return Made(output, str(tensor.dtype).removeprefix("torch."), tuple(map(int, tensor.shape)))
