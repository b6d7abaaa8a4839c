"""The rows of a sampler's loop one behind another, where every decision of its step cache is known: no loop, no branch.

A row that reuses holds nothing of the region that it leaves out, and what only a decision would have read is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.passes.onnx.parts import live
from hasten.passes.onnx.protos import copied, identity, renamed
from hasten.passes.onnx.traced import own_names, subgraphs


class Unrolled(NamedTuple):
    """Nodes in order, the constants that they read, what they know of values, and what the last row returns."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]
    infos: list[onnx.ValueInfoProto]
    ends: list[str]


def unrolled(
    body: onnx.GraphProto,
    bits: Sequence[bool],
    start: Sequence[str],
    first: str,
    decided: Collection[str],
    fresh: Callable[[str], str],
) -> Unrolled:
    """Write a loop's ``body`` once for each of ``bits``, from the carried values ``start``.

    ``decided`` are the values in it that say whether a row computes, ``first`` the number of the loop's first row,
    which is 0 here. ``fresh`` makes a name that nothing has from a base.
    """
    iteration, _, *held = (v.name for v in body.input)
    _, *ends = (v.name for v in body.output)
    made = Unrolled([], list(body.initializer), [], list(start))
    weights = {t.name for t in body.initializer}
    told = {bit: fresh(f"loop/computed/{bit}".lower()) for bit in dict.fromkeys(bits)}
    made.constants.extend(_scalar(np.bool_(bit), name) for bit, name in told.items())
    zero = fresh("loop/first")
    made.constants.append(_scalar(np.int64(0), zero))
    forms = {bit: _decided(body, bit, told[bit], decided, ends, made.constants) for bit in told}
    for number, bit in enumerate(bits):
        row = fresh(f"loop/row/{number}")
        made.constants.append(_scalar(np.int64(number), row))
        own = {n for node in forms[bit] for n in _made(node)}
        names = {name: fresh(f"{name}/{number}") for name in sorted(own - weights)}
        names |= {iteration: row, first: zero, **dict(zip(held, made.ends, strict=True))}
        for node in forms[bit]:
            made.nodes.append(renamed(node, names))
            made.nodes[-1].name = fresh(f"{node.name}/{number}")  # two branches may have nodes of one name
        for value in body.value_info:
            if value.name in own:
                made.infos.append(copied(value))
                made.infos[-1].name = names[value.name]
        made.ends[:] = [names.get(name, name) for name in ends]
    return made


def _decided(
    body: onnx.GraphProto,
    bit: bool,
    told: str,
    decided: Collection[str],
    ends: Sequence[str],
    constants: list[onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """The nodes of a row in which ``decided`` is known: the branch that is taken stands in its conditional's place."""
    nodes: list[onnx.NodeProto] = []
    known = dict.fromkeys(decided, told)
    for node in body.node:
        if node.op_type == "If" and node.input[0] in decided:
            taken = next(a.g for a in node.attribute if a.name == ("then_branch" if bit else "else_branch"))
            constants.extend(taken.initializer)
            nodes += [_reading(inner, known) for inner in taken.node]
            nodes += [identity(known.get(v.name, v.name), o) for v, o in zip(taken.output, node.output, strict=True)]
        else:
            nodes.append(_reading(node, known))
    nodes, _ = live(nodes, ends)
    return nodes


def _reading(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy of ``node`` that reads other names; what it makes keeps its own."""
    copy = renamed(node, names)
    copy.output[:] = node.output
    return copy


def _made(node: onnx.NodeProto) -> set[str]:
    """Every value that a node and the graphs in it make."""
    return {*filter(None, node.output), *(name for graph in subgraphs(node) for name in own_names(graph))}


def _scalar(value: np.generic, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)
