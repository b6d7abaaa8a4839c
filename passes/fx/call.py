"""One FX call's arguments by name, and the rows of the table that reads calls."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from hasten.passes.pattern import OpView

if TYPE_CHECKING:
    from hasten.passes.fx.view import FxView


@dataclass
class Call:
    """One node's arguments by name."""

    view: FxView
    node: fx.Node
    name: str
    arguments: tuple[str, ...]

    def raw(self, name: str, default: Any = None) -> Any:
        position = self.arguments.index(name) if name in self.arguments else -1
        if 0 <= position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def value(self, name: str) -> Any:
        """The argument as an operand; None where it is absent."""
        return self.view.lift(self.raw(name))

    def rest(self, name: str) -> tuple[Any, ...]:
        """The list argument ``name``, also where a method was given its items one by one."""
        first = self.raw(name, ())
        if isinstance(first, (tuple, list)):
            return tuple(first)
        return tuple(self.node.args[self.arguments.index(name) :])

    def shape(self, name: str) -> tuple[Any, ...] | None:
        operand = self.value(name)
        return None if operand is None else self.view.shape(operand)

    def axis(self, axis: Any, name: str = "self", extra: int = 0) -> int | None:
        """A non-negative axis of operand ``name``, or None where it cannot be told."""
        shape = self.shape(name)
        if shape is None or not isinstance(axis, int):
            return None
        return axis % (len(shape) + extra) if len(shape) + extra else 0


@dataclass(frozen=True)
class Row:
    """Positional argument names and how to read the call; the reader returns None to leave the node unknown."""

    arguments: tuple[str, ...]
    read: Callable[[Call], OpView[Any] | None]


@dataclass(frozen=True)
class TupleRow:
    """How to read one item of a node that makes a tuple."""

    arguments: tuple[str, ...]
    read: Callable[[Call, int], OpView[Any] | None]


def mutates(node: fx.Node, name: str) -> bool:
    """Whether a call changes one of its arguments in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or _ASSIGNMENT.fullmatch(name) is not None or _inplace(node) or "out" in node.kwargs


_ASSIGNMENT = re.compile(
    r"(?:__)?(?:setitem|i(?:add|sub|mul|truediv|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift))(?:__)?"
    r"|triton_kernel_wrapper_mutation"
)


def _inplace(node: fx.Node) -> bool:
    """``F.silu(x, inplace=True)``, and ``F.silu(x, True)``."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if getattr(node.target, "__module__", "") != "torch.nn.functional" or len(node.args) < 2:
        return False
    try:
        names = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # a builtin: torch._C._nn.gelu
        return False
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])
