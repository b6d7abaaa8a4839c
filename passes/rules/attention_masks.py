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

ABSORBS = 1e15
"""A filler beyond this leaves nothing of an ordinary number added to it, in float64 either."""


@dataclass(frozen=True)
class Condition(Generic[V]):
    """Attention is allowed where ``value`` is true (``negated``: false); elsewhere the scores become ``filler``.

    ``outer`` is how many of the added masks come after the filling.
    """

    value: V
    negated: bool
    filler: float
    outer: int = 0

    def allowed(self, view: GraphView[V]) -> npt.NDArray[np.bool_] | None:
        """Where attention is allowed, if that is known."""
        content = view.constant(self.value)
        return None if content is None else np.logical_xor(content.astype(bool), self.negated)

    def keeps_empty_rows(self, view: GraphView[V]) -> bool:
        """Whether a row without a key may occur and has weights all the same, since the filler is finite."""
        known = self.allowed(view)
        leaves_a_key = known is not None and known.ndim > 0 and bool(known.any(-1).all())
        return not math.isinf(self.filler) and not leaves_a_key


@dataclass(frozen=True)
class Masks(Generic[V]):
    """``added``: (value, factor), the one nearest to the softmax first; ``conditions`` likewise."""

    added: tuple[tuple[V, float], ...] = ()
    conditions: tuple[Condition[V], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.conditions)

    def values(self) -> Iterator[V]:
        yield from (m[0] for m in self.added)
        yield from (c.value for c in self.conditions)

    def with_added(self, value: V, factor: float) -> Masks[V]:
        return replace(self, added=(*self.added, (value, factor)))

    def with_condition(self, value: V, negated: bool, filler: float) -> Masks[V]:
        return replace(self, conditions=(*self.conditions, Condition(value, negated, filler, len(self.added))))

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
        if len(self.conditions) > 1 and any(c.keeps_empty_rows(view) for c in self.conditions):
            where = view.where(self.conditions[0].value)
            return f"the mask {where} is one of several, and what a row without a key attends to depends on all of them"
        return None


def of_fused(view: GraphView[V], mask: V) -> Masks[V]:
    """The mask operand of an attention operator: bool allows, anything else is added."""
    if view.dtype(mask) == "bool":
        return Masks(conditions=(Condition(mask, False, -math.inf),))
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
    conditions = [c for c in masks.conditions if (known := c.allowed(view)) is None or not known.all()]
    added = [(n, a) for n, a in enumerate(masks.added) if (known := view.constant(a[0])) is None or known.any()]
    if not added and len(conditions) == 1 and _is_causal(conditions[0].allowed(view)):
        return Mask(query, causal=True)
    if not conditions and len(added) == 1 and added[0][1][1] > 0 and _is_causal(_bias_allows(view, added[0][1][0])):
        return Mask(query, causal=True)

    allowed: V | None = None
    for condition in conditions:
        value = condition.value
        if condition.negated:
            value = view.emit("logical_not", [value], {}, at=root)
        allowed = value if allowed is None else view.emit("logical_and", [allowed, value], {}, at=root)
    outer = [_sized(view, a, query, root) for n, a in added if conditions and n < conditions[0].outer]
    inner = [_sized(view, a, query, root) for n, a in added if not conditions or n >= conditions[0].outer]
    after, total = _sum(view, outer, root), _sum(view, [*outer, *inner], root)

    if allowed is not None and conditions[0].keeps_empty_rows(view):
        query, allowed, some = _keep_empty_rows(view, query, allowed, root)
        if total is not None:
            total = _without_key(view, total, after, conditions[0].filler, some, root)
    if total is not None and allowed is not None:
        forbidden = view.number(-math.inf, like=total, at=root)
        total = view.emit("where", [allowed, total, forbidden], {}, at=root)
    return Mask(query, allowed if total is None else total)


def _sized(view: GraphView[V], mask: tuple[V, float], query: V, root: V) -> V:
    """An added mask times its factor, in the query's type."""
    value, factor = mask
    dtype = view.dtype(query)
    if factor != 1:
        value = view.emit("mul", [value, view.number(factor, like=value, at=root)], {}, at=root)
    if dtype is not None and view.dtype(value) != dtype:
        value = view.emit("cast", [value], {"to": dtype}, at=root)
    return value


def _sum(view: GraphView[V], values: list[V], root: V) -> V | None:
    total: V | None = None
    for value in values:
        total = value if total is None else view.emit("add", [total, value], {}, at=root)
    return total


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


def _keep_empty_rows(view: GraphView[V], query: V, allowed: V, root: V) -> tuple[V, V, V]:
    """A row of finite fillers has uniform weights: its query becomes zero and every key is allowed.

    Returns query, mask, and which rows have a key.
    """
    shape = view.shape(allowed) or (1,)
    some = view.emit("any", [allowed], {"axes": (len(shape) - 1,), "keepdims": True}, at=root)
    none = view.emit("logical_not", [some], {}, at=root)
    kept = view.emit("where", [some, query, view.number(0.0, like=query, at=root)], {}, at=root)
    return kept, view.emit("logical_or", [allowed, none], {}, at=root), some


def _without_key(view: GraphView[V], total: V, after: V | None, filler: float, some: V, root: V) -> V:
    """What is added to a row of fillers: only what is added after the filling, and only as far as it shows beside it.

    Beside the smallest float nothing shows but what is as large; adding the filler and taking it away again loses just
    that. Beside -1e4 it would lose digits that are the spelling's rounding alone.
    """
    if after is None:
        return view.emit("where", [some, total, view.number(0.0, like=total, at=root)], {}, at=root)
    for name in ("add", "sub") if abs(filler) > ABSORBS else ():
        after = view.emit(name, [after, view.number(filler, like=after, at=root)], {}, at=root)
    return view.emit("where", [some, total, after], {}, at=root)
