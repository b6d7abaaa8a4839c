"""The two ends of a region of blocks: which values stand for the streams before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from hasten.passes.steps.flow import Flow, V
from hasten.passes.steps.span import Refusal
from hasten.passes.steps.stack import Stack


@dataclass(frozen=True)
class Pairs(Generic[V]):
    """Values before and after, pairwise; ``extra``: values inside that are read outside besides."""

    before: tuple[V, ...]
    after: tuple[V, ...]
    extra: tuple[V, ...] = ()
    no_residual: str | None = None


def choose_pairs(stack: Stack[V], first: int, last: int) -> Pairs[V] | Refusal:
    """The ends of blocks ``first`` to ``last`` (left out), such that nothing inside is needed besides.

    Fewest streams are tried first, each in an order of its elements that it has at both ends. Where there is none, the
    ends are the streams as they are, and the value is the only payload. Where values inside are read outside all the
    same, they are ``extra``.
    """
    flow = stack.flow
    entry = [s for stream in (stack.main, *stack.sides) if (s := stack.source(stream, first)) is not None]
    options = list(_options(stack, first, last))
    for pairs in options:
        if not leaks(flow, entry, pairs.after):
            return pairs
    for pairs in options:
        extra = leaks(flow, entry, pairs.after)
        if all(flow.data.sizes(v) is not None for v in extra) and not leaks(flow, entry, (*pairs.after, *extra)):
            return Pairs(pairs.before, pairs.after, tuple(extra), pairs.no_residual)
    named = ", ".join(flow.view.where(v) for v in leaks(flow, entry, options[0].after)[:3])
    return Refusal(f"blocks {first} to {last - 1} make {named}, which is read outside and cannot be kept")


def leaks(flow: Flow[V], entry: Sequence[V], after: Sequence[V]) -> list[V]:
    """Values on the way from ``entry`` to ``after`` that are read elsewhere; none where making them costs nothing."""
    way = (flow.below(entry) & flow.above(after)) - set(after)
    outside = flow.above(flow.outputs, set(after))
    leaked = (way & outside) - set(entry)
    if not flow.flops(leaked):
        return []
    ends = {v for v in leaked if v in flow.outputs or any(u in outside and u not in way for u in flow.users.get(v, ()))}
    return sorted(ends, key=flow.place)


def _options(stack: Stack[V], first: int, last: int) -> Iterator[Pairs[V]]:
    """Candidates, best first."""
    own = list(_alike(stack, frozenset({stack.main}), first, last))
    for pair in own:
        yield Pairs((pair[0],), (pair[1],))
    sides = [list(_alike(stack, frozenset({s}), first, last)) for s in stack.sides]
    if own and sides and all(sides):
        for pair in own:
            yield _together([pair, *(s[0] for s in sides)])
    for before, after in _alike(stack, frozenset({stack.main, *stack.sides}), first, last) if stack.sides else ():
        yield Pairs((before,), (after,))
    for streams in ((stack.main,), (stack.main, *stack.sides)):
        ends = [(stack.source(s, first), stack.source(s, last)) for s in streams]
        yield _together([(a, b) for a, b in ends if a is not None and b is not None], stack)


def _alike(stack: Stack[V], streams: frozenset[int], first: int, last: int) -> Iterator[tuple[V, V]]:
    """Holders of the same streams at both boundaries, in the same order of elements; the earliest before."""
    before = stack.holders(streams, first)
    for after in stack.holders(streams, last):
        found = next((b for b in before if _same(stack, b, after)), None)
        if found is not None:
            yield found, after


def _same(stack: Stack[V], a: V, b: V) -> bool:
    """Whether elements of two holders of the same streams correspond one to one."""
    view = stack.flow.view
    if view.shape(a) != view.shape(b) or view.dtype(a) != view.dtype(b):
        return False
    orders = [[(p.stream, p.size, p.layout) for p in stack.streams.points[v].parts] for v in (a, b)]
    return orders[0] == orders[1] and all(layout is not None for _, _, layout in orders[0])


def _together(pairs: Sequence[tuple[V, V]], stack: Stack[V] | None = None) -> Pairs[V]:
    reason = None
    if stack is not None:
        reason = next((r for a, b in pairs if (r := _difference(stack, a, b)) is not None), None)
    return Pairs(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), (), reason)


def _difference(stack: Stack[V], before: V, after: V) -> str | None:
    view = stack.flow.view
    if view.shape(before) != view.shape(after):
        return f"the stream has shape {view.shape(before)} before the region and {view.shape(after)} after it"
    points = stack.streams.points
    if [p.stream for p in points[before].parts] != [p.stream for p in points[after].parts]:
        return "the streams are apart before the region and one after it"
    return None if _same(stack, before, after) else "the elements of the stream are in another order after the region"
