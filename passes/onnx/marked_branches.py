"""An ``If`` of every pair of branches that stands in line between marks; see `passes.fx.marked_branches`.

A branch gets the nodes that nothing but its results need and that stand behind its `ENTER`; what both sides or others
read as well, such as a constant, stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from hasten.passes.onnx.parts import live
from hasten.passes.onnx.traced import fresh, own_names, reads, rename

DOMAIN, ENTER, LEAVE = "hasten", "BranchEnter", "BranchLeave"
SIDES = ("then_branch", "else_branch")


def gather(model: onnx.ModelProto) -> onnx.ModelProto:
    """Change ``model`` in place, so that no mark is left; it is returned."""
    graph = model.graph
    if not any(_is(node, LEAVE) for node in graph.node):
        return model
    names = set(own_names(graph))
    infos = {v.name: v for v in (*graph.value_info, *graph.output)}
    nodes = list(graph.node)
    # Producers come first, so that the marks inside a branch are gone when its own are reached.
    while (place := next((i for i, node in enumerate(nodes) if _is(node, LEAVE)), None)) is not None:
        nodes = _gathered(nodes, place, [v.name for v in graph.output], infos, names)
    kept, _ = live(nodes, [v.name for v in graph.output])
    made = {name for node in kept for name in node.output}
    body = onnx.GraphProto(node=kept, value_info=[v for v in graph.value_info if v.name in made])
    for field in ("node", "value_info"):
        graph.ClearField(field)
    graph.MergeFrom(body)
    return model


def _gathered(
    nodes: list[onnx.NodeProto],
    place: int,
    outputs: Sequence[str],
    infos: Mapping[str, onnx.ValueInfoProto],
    names: set[str],
) -> list[onnx.NodeProto]:
    """``nodes`` with the conditional that ends at ``place`` in one node."""
    mark = nodes[place]
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in mark.attribute}
    number, name = attributes["number"], attributes["called"].decode()
    enters = {i: n for i, n in enumerate(nodes) if _is(n, ENTER) and _number(n) == number}
    entering = {inner: outer for n in enters.values() for outer, inner in zip(n.input, n.output, strict=True)}
    ends = list(mark.input[1:])
    sides = ends[: len(ends) // 2], ends[len(ends) // 2 :]
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for value in reads(node):
            readers.setdefault(value, []).append(i)
    left = {*outputs, mark.input[0], *(set(sides[0]) & set(sides[1]))}
    branches, moved = {}, {place, *enters}
    for label, results in zip(SIDES, sides, strict=True):
        inside: set[int] = set()
        for i in reversed(range(place)):
            read = [(value, user) for value in nodes[i].output for user in readers.get(value, ())]
            own = all(user in inside or (user == place and value in results) for value, user in read)
            if read and own and left.isdisjoint(nodes[i].output) and i not in moved and not _is(nodes[i], ENTER):
                inside.add(i)
        moved |= inside
        own_nodes = [nodes[i] for i in sorted(inside)]
        branches[label] = _branch(f"{name}/{label}", own_nodes, results, mark.output, entering, infos, names)
    choice = helper.make_node("If", [mark.input[0]], list(mark.output), name=name, **branches)
    rest = [choice if i == place else node for i, node in enumerate(nodes) if i == place or i not in moved]
    for node in rest:
        rename(node, entering)
    return rest


def _branch(
    name: str,
    nodes: list[onnx.NodeProto],
    results: Sequence[str],
    chosen: Sequence[str],
    entering: Mapping[str, str],
    infos: Mapping[str, onnx.ValueInfoProto],
    names: set[str],
) -> onnx.GraphProto:
    """A graph without inputs that makes ``results``, of the types of ``chosen``, each under a name of its own."""
    for node in nodes:
        rename(node, entering)
    free = {value for node in nodes for value in node.output}
    outputs = []
    for result, like in zip(results, chosen, strict=True):
        source = output = entering.get(result, result)
        if source not in free:
            output = fresh(f"{name}/{source}", names)
            nodes.append(helper.make_node("Identity", [source], [output], name=output))
        free.discard(output)
        outputs.append(onnx.ValueInfoProto(name=output, type=infos[like].type))
    graph = helper.make_graph(nodes, name, [], outputs)
    returned = {o.name for o in outputs}
    made = [value for node in nodes for value in node.output if value not in returned]
    graph.value_info.extend(infos[value] for value in made if value in infos)
    return graph


def _is(node: onnx.NodeProto, mark: str) -> bool:
    return node.domain == DOMAIN and node.op_type == mark


def _number(node: onnx.NodeProto) -> int:
    return int(next(a.i for a in node.attribute if a.name == "number"))
