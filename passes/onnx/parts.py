"""The nodes of a graph before, inside and after a region that is to be skipped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import onnx

from hasten.errors import HastenError
from hasten.passes.onnx.traced import reads


class Parts(NamedTuple):
    """Each in the graph's order; ``before`` reads nothing of the others."""

    before: list[onnx.NodeProto]
    inside: list[onnx.NodeProto]
    later: list[onnx.NodeProto]


def split(
    graph: onnx.GraphProto,
    inside: Iterable[str],
    entering: Sequence[str],
    leaving: Sequence[str],
    looked_at: Sequence[str],
    *,
    closed: bool,
) -> Parts:
    """Take ``graph`` apart. ``inside``: a value of each node of the region; ``entering``, ``leaving``: its streams.

    ``looked_at`` is what the decision needs. It and the streams into the region stand before the region, and so does
    what is read behind it without depending on what comes in. ``closed``: nothing in the region may read what is
    behind it, as one branch demands. Raises `HastenError` where the region cannot be skipped as it is.
    """
    nodes = list(graph.node)
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    read = [list(reads(node)) for node in nodes]
    users: list[set[int]] = [set() for _ in nodes]
    for i, names in enumerate(read):
        for name in names:
            if name in makers:
                users[makers[name]].add(i)
    given = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    given |= {t.values.name for t in graph.sparse_initializer}
    for name in (*inside, *entering, *leaving, *looked_at):
        if name not in makers and name not in given:
            raise HastenError(f"the region to be skipped names {name!r}, which is no value of the model's main graph")

    def above(wanted: Iterable[str], stop: Collection[str] = ()) -> set[int]:
        return _reach(
            (makers[n] for n in wanted if n in makers and n not in stop),
            lambda i: [makers[n] for n in read[i] if n in makers and n not in stop],
        )

    needed = above((*looked_at, *entering) if closed else looked_at)
    if wrong := [name for name in leaving if makers.get(name) in needed]:
        raise HastenError(f"the decision's signal depends on {wrong[0]}, the result of the region to be skipped")
    skipped = {makers[name] for name in inside if name in makers} - needed - above(entering, leaving)
    if wrong := [name for name in leaving if makers.get(name) not in skipped]:
        raise HastenError(f"{wrong[0]} shall come out of the region to be skipped, and no node in it makes that")

    moving = _reach((i for i in skipped if not set(entering).isdisjoint(read[i])), users.__getitem__)
    for name, reader in _escaping(graph, nodes, read, makers, skipped, leaving):
        if makers[name] in moving:
            raise HastenError(
                f"{name} is made in the region to be skipped and read after it, by {reader}; the region must end in it"
            )
        skipped -= above([name])
    later = _reach(skipped, users.__getitem__) - skipped
    for i in sorted(skipped) if closed else ():
        if wrong := [name for name in read[i] if makers.get(name) in later]:
            reader = where(nodes[i])
            raise HastenError(f"{wrong[0]} follows the region to be skipped, and {reader} in the region reads it")

    def chosen(wanted: Callable[[int], bool]) -> list[onnx.NodeProto]:
        return [node for i, node in enumerate(nodes) if wanted(i)]

    return Parts(
        chosen(lambda i: i not in skipped and i not in later),
        chosen(skipped.__contains__),
        chosen(later.__contains__),
    )


def where(node: onnx.NodeProto) -> str:
    """How messages call a node."""
    return f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"


def live(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """Those of ``nodes``, in order, that ``outputs`` need, and every name that is read, ``outputs`` included."""
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(reads(node))
    return kept[::-1], wanted


def ordered(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Producers before users, otherwise the order there was. No value may depend on itself."""
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    done: dict[int, None] = {}
    for start in range(len(nodes)):
        todo = [start]
        while todo:
            missing = [makers[n] for n in reads(nodes[todo[-1]]) if n in makers and makers[n] not in done]
            if missing:
                todo.append(missing[0])
            else:
                done[todo.pop()] = None
    return [nodes[i] for i in done]


def _escaping(
    graph: onnx.GraphProto,
    nodes: Sequence[onnx.NodeProto],
    read: Sequence[Sequence[str]],
    makers: dict[str, int],
    skipped: Collection[int],
    leaving: Collection[str],
) -> list[tuple[str, str]]:
    """Values of the region that are read outside it and are no stream, each with its reader."""
    readings = [(name, where(node)) for i, node in enumerate(nodes) if i not in skipped for name in read[i]]
    readings += [(v.name, "the model's outputs") for v in graph.output]
    return [(name, reader) for name, reader in readings if makers.get(name) in skipped and name not in leaving]


def _reach(start: Iterable[int], following: Callable[[int], Iterable[int]]) -> set[int]:
    found: set[int] = set()
    todo = list(start)
    while todo:
        if (i := todo.pop()) not in found:
            found.add(i)
            todo.extend(following(i))
    return found
