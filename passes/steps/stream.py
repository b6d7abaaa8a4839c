"""Residual streams: what reaches an addition both as it is and through the layer whose result is added.

In ``y = x + f(x, …)`` the value x, y and all that only moves their elements (reshape, transpose, cast, slice and
concatenation of streams) are points of one stream. A stream starts at the x of its first such addition, so what was
added before, as a position embedding, is no part of it; what is added to it later is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Generic

from hasten.passes.steps.flow import Flow, V
from hasten.passes.steps.layout import Layout, plain, transposed


@dataclass(frozen=True)
class Part(Generic[V]):
    """What a value holds of one stream: the elements of ``source``, in ``layout``.

    ``source`` is the stream's origin, or the last addition passed; ``size`` is along the axis of concatenation, 0 where
    there is none.
    """

    stream: int
    source: V
    size: int
    layout: Layout | None


@dataclass(frozen=True)
class Point(Generic[V]):
    """A value on one stream, or on several that are concatenated along ``axis``."""

    parts: tuple[Part[V], ...]
    axis: int | None = None


@dataclass(frozen=True)
class Step(Generic[V]):
    """One addition on a stream: ``value = x + change``. ``path``: from the stream to ``change``, in order."""

    value: V
    x: V
    change: V
    path: tuple[V, ...] = field(repr=False)


class Streams(Generic[V]):
    """All streams of a graph: their points by value, their steps in order."""

    def __init__(self, flow: Flow[V]) -> None:
        self.flow = flow
        self.points: dict[V, Point[V]] = {}
        self.origins: list[V] = []
        self.steps: list[list[Step[V]]] = []
        for value in flow.values:
            point = self._point(value)
            if point is not None:
                self.points[value] = point

    def streams_of(self, value: V) -> tuple[int, ...]:
        """The streams that ``value`` is a point of."""
        return tuple(p.stream for p in self.points[value].parts) if value in self.points else ()

    def _point(self, value: V) -> Point[V] | None:
        moved = self.flow.moved(value)
        if moved is not None:
            return self._moved(value, moved) if moved in self.points else None
        op = self.flow.view.op(value)
        if op is not None and op.name == "add":
            return self._added(value, op.inputs[0], op.inputs[1])
        if (joined := self.flow.data.joined(value)) is not None:
            return self._joined(value, joined.parts, joined.axis)
        if (piece := self.flow.data.piece(value)) is not None and piece.whole in self.points:
            return _piece(self.points[piece.whole], piece.axis, piece.start, piece.stop)
        return None

    def _moved(self, value: V, source: V) -> Point[V] | None:
        """A reshaped, transposed or cast point; a joint one must keep the axis of concatenation whole."""
        point, op = self.points[source], self.flow.view.op(value)
        before, after = self.flow.data.sizes(source), self.flow.data.sizes(value)
        if op is None or before is None or after is None:
            return None
        if op.name == "transpose":
            return _transposed(point, before, op.attrs["perm"])
        if op.name == "reshape" and point.axis is not None:
            axis = _same_axis(before, after, point.axis)
            return None if axis is None else replace(point, axis=axis)
        return point

    def _added(self, value: V, a: V | None, b: V | None) -> Point[V] | None:
        if a is None or b is None:
            return None
        shape = self.flow.view.shape(value)
        for x, change in ((a, b), (b, a)):
            source = self._source(x, change) if self.flow.view.shape(x) == shape else None
            if source is not None:
                if x not in self.points:
                    self._start(x, value)
                if set(self.streams_of(x)) & set(self.streams_of(change)):
                    return None  # what blocks made of x is added to it: they end here
                return self._step(value, x, change, self.flow.path(source, change))
        for x, change in ((a, b), (b, a)):
            if x in self.points and change not in self.points and self.flow.view.shape(x) == shape:
                for earlier in self._earlier(x):
                    if path := self.flow.path(earlier, change):
                        return self._step(value, x, change, path)
                return _at(self.points[x], value)
        return None

    def _source(self, x: V, change: V) -> V | None:
        """``x``, or what it was moved from, if ``change`` is made from it."""
        if self.flow.place(change) < 0:
            return None
        source: V | None = x
        while source is not None and not self.flow.feeds(source, change):
            source = self.flow.moved(source)
        return source

    def _earlier(self, x: V) -> list[V]:
        """Where a layer may start that runs beside the one before it: the x of the last steps."""
        steps = self.steps[self.points[x].parts[-1].stream]
        return [s.x for s in reversed(steps[-2:])]

    def _step(self, value: V, x: V, change: V, path: list[V]) -> Point[V]:
        point = self.points[x]
        step = Step(value, x, change, tuple(path))
        for stream in dict.fromkeys(p.stream for p in point.parts):
            self.steps[stream].append(step)
        return _at(point, value)

    def _start(self, x: V, first: V) -> None:
        """A new stream at ``x``, or above the moves before it where the layer already reads that, or it is on one."""
        moves = [x]
        while (above := self.flow.moved(moves[-1])) is not None:
            if above not in self.points and not self._read_below(above, moves[-1], first):
                break
            moves.append(above)
            if above in self.points:
                break
        above = moves.pop()
        if above not in self.points:
            self.points[above] = self._new(above)
        while moves:
            point = self._moved(moves[-1], above)
            above = moves.pop()
            self.points[above] = point if point is not None else self._new(above)

    def _read_below(self, above: V, move: V, first: V) -> bool:
        users = [u for u in self.flow.users.get(above, ()) if u != move and self.flow.place(u) < self.flow.place(first)]
        return any(self.flow.feeds(u, first) for u in users)

    def _new(self, origin: V) -> Point[V]:
        self.origins.append(origin)
        self.steps.append([])
        sizes = self.flow.data.sizes(origin)
        return Point((Part(len(self.origins) - 1, origin, 0, None if sizes is None else plain(sizes)),))

    def _joined(self, value: V, parts: tuple[V, ...], axis: int) -> Point[V] | None:
        if not any(p in self.points for p in parts):
            return None
        held: list[Part[V]] = []
        for part in parts:
            sizes = self.flow.data.sizes(part)
            if sizes is None:
                return None
            if part not in self.points:
                self.points[part] = self._new(part)
            point = self.points[part]
            if point.axis not in (None, axis):
                return None
            held += point.parts if point.axis is not None else [replace(point.parts[0], size=sizes[axis])]
        return Point(tuple(held), axis) if len({p.stream for p in held}) == len(held) else None


def _at(point: Point[V], source: V) -> Point[V]:
    """The same streams after an addition; its elements are in the order that they were in."""
    return Point(tuple(replace(p, source=source) for p in point.parts), point.axis)


def _transposed(point: Point[V], sizes: tuple[int, ...], perm: tuple[int, ...]) -> Point[V]:
    parts = []
    for part in point.parts:
        own = list(sizes)
        if point.axis is not None:
            own[point.axis] = part.size
        parts.append(replace(part, layout=transposed(part.layout, own, perm)))
    return Point(tuple(parts), None if point.axis is None else perm.index(point.axis))


def _same_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where an axis is after a reshape that keeps it whole."""
    outer, reached = math.prod(before[:axis]), 1
    for place, size in enumerate(after):
        if reached == outer and size == before[axis]:
            return place
        reached *= size
    return None


def _piece(point: Point[V], axis: int, start: int, stop: int) -> Point[V] | None:
    """The streams of a slice that cuts between streams, along the axis of concatenation."""
    if point.axis != axis:
        return None
    kept, at = [], 0
    for part in point.parts:
        if start <= at and at + part.size <= stop:
            kept.append(part)
        elif at < stop and at + part.size > start:
            return None
        at += part.size
    if not kept or sum(p.size for p in kept) != stop - start:
        return None
    return Point(tuple(kept), axis) if len(kept) > 1 else Point((replace(kept[0], size=0),))
