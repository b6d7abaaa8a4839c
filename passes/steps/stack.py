"""The stack: the residual stream that a model's blocks work on, with the streams beside it, cut into blocks.

A boundary is a place between two blocks: 0 before the first, L after the last of L. At each, every stream has one
*source* (what it held then), and *holders*: the values with exactly its elements. In a joint model (FLUX, SD3,
CogVideoX) the text is a stream beside the picture's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic

from hasten.passes.steps.blocks import Block, attends, find_blocks
from hasten.passes.steps.flow import Flow, V
from hasten.passes.steps.stream import Step, Streams


@dataclass(frozen=True)
class Stack(Generic[V]):
    """The blocks of stream ``main``, and the other streams that change among them."""

    flow: Flow[V] = field(repr=False)
    streams: Streams[V] = field(repr=False)
    main: int
    blocks: tuple[Block[V], ...]

    def source(self, stream: int, boundary: int) -> V | None:
        """What ``stream`` held at ``boundary``; None where it did not exist yet."""
        own = self._own[boundary]
        if stream == self.main:
            return own
        before = [s for s in self._sources[stream] if s == own or self._depth.get(s, -1) < boundary]
        return before[-1] if before else None

    def holders(self, streams: frozenset[int], boundary: int) -> list[V]:
        """The values that hold exactly these streams as they were at ``boundary``, in order."""
        wanted = {s: self.source(s, boundary) for s in streams}
        return [v for v in self._points_of.get(streams, ()) if all(wanted[s] == o for s, o in self._held(v))]

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """The streams that change along with the main one."""
        last = len(self.blocks)
        return tuple(
            s
            for s in range(len(self.streams.origins))
            if s != self.main and self.source(s, last) != self.source(s, 0) and len(self.streams.steps[s]) > 1
        )

    def between(self, stream: int, block: int) -> list[Step[V]]:
        """The steps of another stream that belong to a block of the main one."""
        known = {v: i for i, v in enumerate(self._sources[stream])}
        ends = [self.source(stream, b) for b in (block, block + 1)]
        first, last = (known[e] if e is not None else -1 for e in ends)
        return [s for s in self.streams.steps[stream] if first < known[s.value] <= last]

    def _held(self, value: V) -> Iterator[tuple[int, V]]:
        return ((p.stream, p.source) for p in self.streams.points[value].parts)

    @cached_property
    def _own(self) -> list[V]:
        """The main stream's source at every boundary."""
        first = next(source for stream, source in self._held(self.blocks[0].steps[0].x) if stream == self.main)
        return [first, *(b.steps[-1].value for b in self.blocks)]

    @cached_property
    def _depth(self) -> dict[V, int]:
        """The last boundary that a value is made from."""
        number = {v: i for i, v in enumerate(self._own)}
        depth: dict[V, int] = {}
        for value in self.flow.values:
            reached = max((depth.get(o, -1) for o in self.flow.operands(value)), default=-1)
            depth[value] = max(reached, number.get(value, -1))
        return depth

    @cached_property
    def _points_of(self) -> dict[frozenset[int], list[V]]:
        found: dict[frozenset[int], list[V]] = {}
        for value in sorted(self.streams.points, key=self.flow.place):
            found.setdefault(frozenset(self.streams.streams_of(value)), []).append(value)
        return found

    @cached_property
    def _sources(self) -> dict[int, list[V]]:
        found: dict[int, dict[V, None]] = {s: {} for s in range(len(self.streams.origins))}
        for value in sorted(self.streams.points, key=self.flow.place):
            for stream, source in self._held(value):
                found[stream].setdefault(source)
        return {s: list(sources) for s, sources in found.items()}


def find_stack(flow: Flow[V]) -> Stack[V] | str:
    """The stack whose blocks do most of the work, or why there is none."""
    streams = Streams(flow)
    found: list[tuple[int, set[V], Stack[V]]] = []
    for stream, steps in enumerate(streams.steps):
        blocks = find_blocks(flow, steps) if len(steps) > 1 else []
        if max(Counter(b.kind for b in blocks).values(), default=0) < 2 or _convolves(flow, blocks):
            continue
        stack = Stack(flow, streams, stream, tuple(blocks))
        if (inside := _inside(stack)) is not None:
            found.append((flow.flops(inside), inside, stack))
    if not found:
        return "no residual stream with repeated blocks was found"
    most = max(work for work, _, _ in found)
    alike = [f for f in found if f[0] >= _ALIKE * most]
    work, inside, best = max(alike, key=lambda f: _elements(flow, f[2].blocks[-1].steps[-1].value))
    elsewhere = {v for _, other, _ in found for v in other} - inside
    if flow.flops(elsewhere) > work:
        return (
            f"the repeated blocks are in {len(found)} rows apart from each other, the longest with "
            f"{work / max(1, flow.flops(flow.values)):.0%} of the operations"
        )
    return best


_ALIKE = 0.98
"""Streams of one joint model lie over nearly the same work; the main one is the larger, the picture or the video."""


def _elements(flow: Flow[V], value: V) -> int:
    return math.prod(flow.data.sizes(value) or ())


def _inside(stack: Stack[V]) -> set[V] | None:
    """What lies between the first boundary and the last; None where nothing outside the streams reads the last."""
    flow, points = stack.flow, stack.streams.points
    last = stack.source(stack.main, len(stack.blocks))
    held = [v for v, p in points.items() if any(q.stream == stack.main and q.source == last for q in p.parts)]
    read = [v for v in held if v in flow.outputs or any(u not in points for u in flow.users.get(v, ()))]
    first = stack.source(stack.main, 0)
    return flow.above(read) & flow.below([first]) if read and first is not None else None


def _convolves(flow: Flow[V], blocks: list[Block[V]]) -> bool:
    """Whether these are blocks of convolutions, as in a VAE: no attention in any."""
    steps = [s for b in blocks for s in b.steps]
    names = {op.name for s in steps for v in s.path if (op := flow.view.op(v)) is not None}
    return bool(names & {"conv2d", "conv3d", "group_norm_act"}) and not any(attends(flow, s) for s in steps)
