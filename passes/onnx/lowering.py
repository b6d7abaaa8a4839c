"""What a lowering is: the node that a target gets instead of another, or why it keeps the one it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView
    from hasten.passes.pipeline import Context


@dataclass(frozen=True)
class Lowered:
    """``new`` stands for ``old``, which is the asked value or one computed from it alone."""

    old: str
    new: str


@dataclass(frozen=True)
class Left:
    """Why a site was left as it is."""

    reason: str


Lowering = Callable[["OnnxView", str, "Context"], "Lowered | Left | None"]
"""None: the node is no site, and nothing is said of it."""


def only_user(view: OnnxView, value: str) -> str | None:
    """The first output of the node that reads ``value``, where there is only one and it stands in the same graph."""
    tensor = view.tensor(value)
    users = [n for n in tensor.outputs if id(n) not in view.owner.tentative]
    if view.uses(value) != 1 or len(users) != 1:
        return None
    name = str(users[0].outputs[0].name)
    return name if view.node(name) is users[0] else None


def heads_last(view: OnnxView, value: str) -> str | None:
    """(B, N, H, D) where ``value`` is its transpose (B, H, N, D)."""
    op = view.op(value)
    if op is None or op.name != "transpose" or op.attrs["perm"] != (0, 2, 1, 3):
        return None
    return op.inputs[0]


def merged(view: OnnxView, value: str, *, at: str) -> str:
    """(B, N, H, D) as (B, N, H D): what it was reshaped from, or a reshape of it."""
    op, shape = view.op(value), view.shape(value)
    if op is not None and op.name == "reshape" and op.inputs[0] is not None and shape is not None:
        source, before = op.inputs[0], view.shape(op.inputs[0])
        if before is not None and len(before) == 3 and before[:2] == shape[:2]:
            return source
    return view.emit("reshape", [value], {"shape": (0, 0, -1)}, at=at)


def attributes(view: OnnxView, value: str) -> dict[str, Any]:
    """Attributes of the node that makes ``value``."""
    return dict(view.node(value).attrs)


def operands(view: OnnxView, value: str) -> list[str | None]:
    """Operands of the node that makes ``value``; None where one is left out."""
    return [t.name or None for t in view.node(value).inputs]
