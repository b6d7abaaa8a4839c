"""Matrix products of any spelling (matmul, bmm, baddbmm, einsum) as one thing: letters for axes, and what is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from hasten.passes.pattern import GraphView, OpView, V, through

_BATCH = "abcdefgh"


@dataclass(frozen=True)
class Contraction(Generic[V]):
    """``scale * sum over shared letters`` of two operands, plus ``weight * addend`` where there is one.

    ``sides`` are (operand slot, value, letters); ``out`` are the result's letters.
    """

    sides: tuple[tuple[int, V, str], tuple[int, V, str]]
    out: str
    scale: float = 1.0
    addend: tuple[int, V] | None = None
    weight: float = 0.0


def contraction(view: GraphView[V], op: OpView[V]) -> Contraction[V] | str:
    """Read ``op`` as a contraction, or say why it is none."""
    if op.name == "matmul":
        return _product(view, (0, op.inputs[0]), (1, op.inputs[1]))
    if op.name == "baddbmm":
        found = _product(view, (1, op.inputs[1]), (2, op.inputs[2]))
        added = op.inputs[0]
        if isinstance(found, str) or added is None:
            return found
        beta, alpha = op.attrs["beta"], op.attrs["alpha"]
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return "baddbmm's alpha or beta is not a number"
        return Contraction(found.sides, found.out, float(alpha), (0, added) if beta else None, float(beta))
    if op.name == "einsum":
        return _einsum(op)
    return f"{op.name} is no matrix product"


def _product(view: GraphView[V], left: tuple[int, V | None], right: tuple[int, V | None]) -> Contraction[V] | str:
    if left[1] is None or right[1] is None:
        return "an operand is absent"
    a, b = view.shape(left[1]), view.shape(right[1])
    if a is None or b is None:
        return "an operand's rank is unknown"
    if len(a) != len(b) or len(a) < 2:
        return f"operands of {len(a)} and {len(b)} axes"
    batch = _BATCH[: len(a) - 2]
    return Contraction(((left[0], left[1], batch + "xz"), (right[0], right[1], batch + "zy")), batch + "xy")


def _einsum(op: OpView[V]) -> Contraction[V] | str:
    equation = str(op.attrs["equation"]).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(op.inputs) != 2 or "." in equation:
        return f"einsum {equation!r} is not a product of two operands with explicit axes"
    if any(len(set(t)) != len(t) for t in (*terms, out)) or not set(out) <= set(inputs):
        return f"einsum {equation!r} repeats an axis"
    first, second = op.inputs
    if first is None or second is None:
        return "an operand is absent"
    return Contraction(((0, first, terms[0]), (1, second, terms[1])), out)


def same_heads(view: GraphView[V], value: V) -> V | None:
    """The (B, H, ·, ·) value that ``value`` (B*H, ·, ·) was reshaped from; None where it was not."""
    value = through(view, value)
    op = view.op(value)
    source = op.inputs[0] if op is not None and op.name == "reshape" else None
    if source is None:
        return None
    before, after = view.shape(source), view.shape(value)
    if before is None or after is None or len(before) != 4 or len(after) != 3 or before[2:] != after[1:]:
        return None
    return source
