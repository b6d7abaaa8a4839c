"""What flows where in a graph: the edges that the search for a region follows, whichever kind of graph it is.

`passes.fx.flow` and `passes.onnx.flow` implement `DataFlow`; `Flow` holds what follows from it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hasten.passes.pattern import GraphView, scalar

V = TypeVar("V", bound=Hashable)


@dataclass(frozen=True)
class Piece(Generic[V]):
    """Elements ``start`` to ``stop`` of ``whole`` along ``axis``, by the sizes of the example."""

    whole: V
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Joined(Generic[V]):
    """``parts`` one after the other along ``axis``."""

    parts: tuple[V, ...]
    axis: int


class DataFlow(Protocol[V]):
    """One graph as values and what they are made from."""

    @property
    def view(self) -> GraphView[V]:
        """The same graph in the neutral vocabulary."""

    def values(self) -> Sequence[V]:
        """Every value that a node makes, producers before users; a tuple and its items are values of their own."""

    def inputs(self) -> Mapping[str, V]:
        """What a caller gives at every call, by name: no parameters, no buffers."""

    def outputs(self) -> Sequence[V]:
        """What the graph returns."""

    def operands(self, value: V, /) -> tuple[V, ...]:
        """What the node that makes ``value`` reads, numbers left out."""

    def made_with(self, value: V, /) -> tuple[V, ...]:
        """Everything that the node makes which makes ``value``."""

    def name(self, value: V, /) -> str:
        """The operator that makes ``value``."""

    def piece(self, value: V, /) -> Piece[V] | None:
        """``value`` as a contiguous piece of another one: a slice, or one result of a split."""

    def joined(self, value: V, /) -> Joined[V] | None:
        """``value`` as a concatenation."""

    def sizes(self, value: V, /) -> tuple[int, ...] | None:
        """The shape, symbolic sizes as in the example; None for what is no tensor, or where there is no example."""

    def flops(self, value: V, /) -> int:
        """Floating-point operations of the node that makes ``value``."""

    def draws(self, value: V, /) -> bool:
        """Whether the node draws random numbers."""

    def owner(self, value: V, /) -> V:
        """The value whose memory ``value`` is a view of; itself where it has its own."""

    def writes(self) -> Collection[V]:
        """The nodes that change a tensor in place: that of the first operand."""


class Flow(Generic[V]):
    """A graph's live values in order, with edges both ways."""

    def __init__(self, data: DataFlow[V]) -> None:
        self.data, self.view = data, data.view
        self.inputs, self.outputs = data.inputs(), tuple(data.outputs())
        self.written: dict[V, V] = {}
        self._operands = self._edges(data)
        made = list(self._operands)
        live = self._above(self.outputs, frozenset())
        self.values = [v for v in made if v in live]
        self.position = {v: i for i, v in enumerate(self.values)}
        self.users: dict[V, list[V]] = {}
        for value in self.values:
            for operand in dict.fromkeys(self._operands[value]):
                self.users.setdefault(operand, []).append(value)
        self._flops = {v: data.flops(v) for v in self.values}
        self._bits = {v: 1 << i for i, v in enumerate(self.inputs.values())}
        for value in self.values:
            self._bits[value] = 0
            for operand in self._operands[value]:
                self._bits[value] |= self._bits.get(operand, 0)

    def _edges(self, data: DataFlow[V]) -> dict[V, tuple[V, ...]]:
        """Operands, and for what reads memory that was written to in place, the last node that did so before."""
        writes, last = set(data.writes()), dict[V, V]()
        edges = {}
        for value in data.values():
            operands = data.operands(value)
            if last:
                operands += tuple(last[o] for o in map(data.owner, operands) if o in last)
            edges[value] = operands
            if value in writes:
                self.written[value] = data.owner(operands[0])
                last[self.written[value]] = value
        return edges

    def operands(self, value: V) -> tuple[V, ...]:
        """What ``value`` is made from; nothing for inputs and parameters."""
        return self._operands.get(value, ())

    def place(self, value: V) -> int:
        """The position of ``value`` among the live values; inputs and parameters are before all."""
        return self.position.get(value, -1)

    def depends_on(self, value: V) -> frozenset[str]:
        """The graph inputs whose content ``value`` depends on."""
        bits = self._bits.get(value, 0)
        return frozenset(name for i, name in enumerate(self.inputs) if bits >> i & 1)

    def flops(self, values: Iterable[V]) -> int:
        """Operations of the nodes that make ``values``."""
        return sum(self._flops.get(v, 0) for v in values)

    def above(self, values: Iterable[V], stop: Collection[V] = frozenset()) -> set[V]:
        """``values`` and all that they are made from, as far as values in ``stop``, which are not part of it."""
        return self._above(values, stop)

    def _above(self, values: Iterable[V], stop: Collection[V]) -> set[V]:
        found: set[V] = set()
        stack = [v for v in values if v not in stop]
        while stack:
            value = stack.pop()
            if value not in found:
                found.add(value)
                stack.extend(v for v in self._operands.get(value, ()) if v not in found and v not in stop)
        return found

    def below(self, values: Iterable[V]) -> set[V]:
        """``values`` and all live values that are made from them."""
        found: set[V] = set()
        stack = list(values)
        while stack:
            value = stack.pop()
            if value not in found:
                found.add(value)
                stack.extend(v for v in self.users.get(value, ()) if v not in found)
        return found

    def feeds(self, source: V, value: V) -> bool:
        """Whether ``value`` is made from ``source``."""
        first, seen, stack = self.place(source), {value}, [value]
        while stack:
            current = stack.pop()
            if current == source:
                return True
            for operand in self.operands(current):
                if operand not in seen and self.place(operand) >= first:
                    seen.add(operand)
                    stack.append(operand)
        return False

    def path(self, source: V, value: V) -> list[V]:
        """The values on ways from ``source``, left out, to ``value``, in order; empty where there is no way."""
        first, seen, stack = self.place(source), {value}, [value]
        while stack:
            for operand in self.operands(stack.pop()):
                if operand not in seen and self.place(operand) > first:
                    seen.add(operand)
                    stack.append(operand)
        marked: set[V] = {source}
        for current in sorted(seen, key=self.place):
            if any(o in marked for o in self.operands(current)):
                marked.add(current)
        return sorted(marked - {source}, key=self.place) if value in marked else []

    def moved(self, value: V) -> V | None:
        """The value that ``value`` holds the elements of, in another order, shape or type; None where it computes."""
        op = self.view.op(value)
        if op is None or op.inputs[0] is None:
            return None
        if op.name in ("identity", "cast", "reshape", "transpose"):
            return op.inputs[0]
        if op.name in ("div", "mul") and scalar(self.view, op.inputs[1]) == 1:
            return op.inputs[0]
        return None
