"""Values of an FX graph that are known at rewrite time: numbers, small buffers, and masks built from factories."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

LIMIT = 1 << 24
"""Elements. A 4096 x 4096 causal mask is just looked at; a weight matrix is not."""

_FACTORIES = frozenset(
    {"zeros", "ones", "full", "arange", "scalar_tensor", "tensor", "eye", "linspace", "lift_fresh_copy"}
)
_LIKE = {"zeros_like": 0, "ones_like": 1, "full_like": None, "new_zeros": 0, "new_ones": 1, "new_full": None}
_PURE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "neg",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_not",
        "logical_and",
        "logical_or",
        "bitwise_not",
        "bitwise_and",
        "bitwise_or",
        "invert",
        "and_",
        "or_",
        "where",
        "masked_fill",
        "tril",
        "triu",
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "expand",
        "permute",
        "transpose",
        "to",
        "float",
        "half",
        "bfloat16",
        "type",
        "bool",
        "int",
        "long",
        "double",
        "clone",
        "contiguous",
        "getitem",
        "slice",
        "select",
        "cumsum",
        "pow",
        "sqrt",
        "rsqrt",
        "exp",
        "detach",
        "alias",
        "_to_copy",
        "floor",
        "floordiv",
    ]
)


def evaluate(
    module: fx.GraphModule, node: fx.Node, name_of: Callable[[fx.Node], str], written: Iterable[fx.Node] = ()
) -> npt.NDArray[Any] | None:
    """The content of ``node`` where it follows from factories, literals and buffers alone; None otherwise.

    Parameters are not constants: weights may be exchanged under a compiled graph. Neither is a value in ``written``,
    whose memory is changed in place: a mask that is filled row by row.
    """
    with unset_fake_temporarily():
        tensor = _evaluate(module, node, name_of, dict.fromkeys(written), 64)
    if tensor is None or not isinstance(tensor, (torch.Tensor, int, float, bool)):
        return None
    if isinstance(tensor, torch.Tensor):
        content = tensor.detach()
        return np.asarray(content.float() if content.dtype == torch.bfloat16 else content)
    return np.asarray(tensor)


def _evaluate(
    module: fx.GraphModule, node: Any, name_of: Callable[[fx.Node], str], seen: dict[fx.Node, Any], depth: int
) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if node in seen:
        return seen[node]
    seen[node] = None
    if depth == 0 or not _small(node):
        return None
    if node.op == "get_attr":
        seen[node] = _buffer(module, str(node.target))
        return seen[node]
    if node.op not in ("call_function", "call_method"):
        return None
    name = name_of(node)
    if name in _LIKE:
        seen[node] = _like(node, name)
        return seen[node]
    if name not in _FACTORIES and name not in _PURE:
        return None
    missing = False

    def argument(inner: Any) -> Any:
        nonlocal missing
        value = _evaluate(module, inner, name_of, seen, depth - 1)
        missing = missing or value is None
        return value

    args = fx.map_arg(node.args, argument)
    kwargs = {k: v for k, v in fx.map_arg(node.kwargs, argument).items() if k not in ("device", "pin_memory")}
    if missing or any(isinstance(a, (torch.SymInt, torch.SymFloat)) for a in node.args):
        return None
    with torch.no_grad():
        if node.op == "call_method":
            seen[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            seen[node] = node.target(*args, **kwargs)
    return seen[node]


def _value(node: fx.Node) -> Any:
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def _small(node: fx.Node) -> bool:
    value = _value(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    if not isinstance(value, torch.Tensor):
        return True
    return all(isinstance(d, int) for d in value.shape) and value.numel() <= LIMIT


def _buffer(module: torch.nn.Module, target: str) -> torch.Tensor | None:
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, torch.Tensor) or isinstance(found, torch.nn.Parameter) or found.numel() > LIMIT:
        return None
    return found


def held(module: torch.nn.Module, node: fx.Node) -> torch.Tensor | None:
    """The parameter or buffer that ``node`` reads, on the CPU; None where it has no content, as under fake tensors."""
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    if not isinstance(found, torch.Tensor) or isinstance(found, FakeTensor) or found.is_meta:
        return None
    with unset_fake_temporarily():
        return found.detach().cpu() if found.layout == torch.strided and not found.is_quantized else None


def _like(node: fx.Node, name: str) -> torch.Tensor | None:
    value, number = _value(node), _LIKE[name]
    if number is None:
        number = node.args[-1] if len(node.args) > 1 else node.kwargs.get("fill_value")
    if not isinstance(value, torch.Tensor) or not isinstance(number, (int, float)):
        return None
    return torch.full(tuple(value.shape), number, dtype=value.dtype)
