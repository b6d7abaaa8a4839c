"""Masks of an attention: gathered while its scores are walked, then combined into the fused operator's one.

A bool mask says where attention is allowed. A filler of -inf means exactly that. A finite filler (-1e4, the smallest
float) does too, except for a row that may attend to nothing: its weights are then uniform. Such rows are kept as they
are, by setting their query to zero and allowing every key, unless the mask is known and has no such row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from hasten.passes.pattern import GraphView, V


@dataclass(frozen=True)
class Masks(Generic[V]):
    """``added``: (value, factor).

    ``conditions``: (value, negated, filler): attention is allowed where the value is true.
    """

    added: tuple[tuple[V, float], ...] = ()
    conditions: tuple[tuple[V, bool, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.conditions)

    def values(self) -> Iterator[V]:
        yield from (m[0] for m in self.added)
        yield from (m[0] for m in self.conditions)

    def with_added(self, value: V, factor: float) -> Masks[V]:
        return replace(self, added=(*self.added, (value, factor)))

    def with_condition(self, value: V, negated: bool, filler: float) -> Masks[V]:
        return replace(self, conditions=(*self.conditions, (value, negated, filler)))

    def check(self, view: GraphView[V], scores: tuple[Any, ...]) -> str | None:
        """Every mask must broadcast to the scores without enlarging them."""
        for value in self.values():
            shape = view.shape(value)
            if shape is None:
                return f"the mask {view.where(value)} has unknown shape"
            if len(shape) > len(scores) or any(
                d != 1 and d != s for d, s in zip(shape[::-1], scores[::-1], strict=False)
            ):
                return f"the mask {view.where(value)} of shape {shape} does not broadcast to scores of shape {scores}"
        return None


def of_fused(view: GraphView[V], mask: V) -> Masks[V]:
    """The mask operand of an attention operator: bool allows, anything else is added."""
    if view.dtype(mask) == "bool":
        return Masks(conditions=((mask, False, -math.inf),))
    return Masks(added=((mask, 1.0),))


@dataclass(frozen=True)
class Mask(Generic[V]):
    """The mask of a fused attention: ``value`` is bool or of the query's type; ``causal`` stands for a known one."""

    query: V
    value: V | None = None
    causal: bool = False


def combine(view: GraphView[V], masks: Masks[V], query: V, root: V) -> Mask[V]:
    """Emit one mask for all of ``masks``: known ones that hide nothing are dropped, a causal one alone becomes a flag.

    The query comes back changed where rows without a key have uniform weights.
    """
    conditions = [c for c in masks.conditions if (known := _allowed(view, c)) is None or not known.all()]
    added = [a for a in masks.added if (content := view.constant(a[0])) is None or content.any()]
    if not added and len(conditions) == 1 and _is_causal(_allowed(view, conditions[0])):
        return Mask(query, causal=True)
    if not conditions and len(added) == 1 and added[0][1] > 0 and _is_causal(_bias_allows(view, added[0][0])):
        return Mask(query, causal=True)

    allowed: V | None = None
    finite = False
    for value, negated, filler in conditions:
        known = _allowed(view, (value, negated, filler))
        finite = finite or (not math.isinf(filler) and (known is None or not bool(known.any(-1).all())))
        if negated:
            value = view.emit("logical_not", [value], {}, at=root)
        allowed = value if allowed is None else view.emit("logical_and", [allowed, value], {}, at=root)
    if allowed is not None and finite:
        query, allowed = _keep_empty_rows(view, query, allowed, root)

    dtype = view.dtype(query)
    total: V | None = None
    for value, factor in added:
        if factor != 1:
            value = view.emit("mul", [value, view.number(factor, like=value, at=root)], {}, at=root)
        if dtype is not None and view.dtype(value) != dtype:
            value = view.emit("cast", [value], {"to": dtype}, at=root)
        total = value if total is None else view.emit("add", [total, value], {}, at=root)
    if total is not None and allowed is not None:
        forbidden = view.number(-math.inf, like=total, at=root)
        total = view.emit("where", [allowed, total, forbidden], {}, at=root)
    return Mask(query, allowed if total is None else total)


def _allowed(view: GraphView[V], condition: tuple[V, bool, float]) -> npt.NDArray[np.bool_] | None:
    """Where attention is allowed, if the condition is known."""
    content = view.constant(condition[0])
    return None if content is None else np.logical_xor(content.astype(bool), condition[1])


def _bias_allows(view: GraphView[V], value: V) -> npt.NDArray[np.bool_] | None:
    """Where an added mask of zeros and -inf allows attention, if it is known and has nothing else in it."""
    content = view.constant(value)
    if content is None or not bool(((content == 0) | np.isneginf(content)).all()):
        return None
    return np.asarray(content == 0)


def _is_causal(allowed: npt.NDArray[np.bool_] | None) -> bool:
    """Whether the last two axes are square and lower triangular, and the others of size one."""
    if allowed is None or allowed.ndim < 2 or allowed.shape[-1] != allowed.shape[-2] or allowed.shape[-1] < 2:
        return False
    rows = allowed.shape[-1]
    return allowed.size == rows * rows and bool((allowed.reshape(rows, rows) == np.tri(rows, dtype=bool)).all())


def _keep_empty_rows(view: GraphView[V], query: V, allowed: V, root: V) -> tuple[V, V]:
    """A row of finite fillers has uniform weights: its query becomes zero and every key is allowed."""
    shape = view.shape(allowed) or (1,)
    some = view.emit("any", [allowed], {"axes": (len(shape) - 1,), "keepdims": True}, at=root)
    none = view.emit("logical_not", [some], {}, at=root)
    kept = view.emit("where", [some, query, view.number(0.0, like=query, at=root)], {}, at=root)
    return kept, view.emit("logical_or", [allowed, none], {}, at=root)
