"""The main graph of an ONNX model as `passes.steps.flow.DataFlow`; what a branch or body reads, its node reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from hasten.passes.onnx import flops as counting
from hasten.passes.onnx.graph import OnnxGraph, operator_name
from hasten.passes.onnx.view import OnnxView
from hasten.passes.steps.flow import Joined, Piece

_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"})


class OnnxFlow:
    """The values are tensor names. Symbolic sizes count as 1."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.view = OnnxView(graph, graph.main)
        self.graph = graph.main.graph
        self.initializers = graph.main.initializers

    def values(self) -> Sequence[str]:
        return list(self.view.values())

    def inputs(self) -> Mapping[str, str]:
        return {t.name: t.name for t in self.graph.inputs if t.name not in self.initializers}

    def outputs(self) -> Sequence[str]:
        return [t.name for t in self.graph.outputs]

    def operands(self, value: str, /) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_reads(self.view.node(value))))

    def made_with(self, value: str, /) -> tuple[str, ...]:
        return tuple(t.name for t in self.view.node(value).outputs if t.name)

    def name(self, value: str, /) -> str:
        return operator_name(self.view.node(value))

    def piece(self, value: str, /) -> Piece[str] | None:
        node = self.view.node(value)
        if node is None or node.op not in ("Slice", "Split") or node.domain not in (None, "", "ai.onnx"):
            return None
        whole = node.inputs[0].name
        before, after = self.sizes(whole), self.sizes(value)
        if before is None or after is None or len(before) != len(after):
            return None
        if node.op == "Split":
            axis = node.attrs.get("axis", 0) % len(before)
            sizes = [self.sizes(t.name) for t in node.outputs]
            place = next(i for i, t in enumerate(node.outputs) if t.name == value)
            if any(s is None for s in sizes):
                return None
            start = sum(s[axis] for s in sizes[:place] if s is not None)
            return Piece(whole, axis, start, start + after[axis])
        numbers = [self._numbers(node, slot) for slot in (1, 3, 4)]
        starts, axes, steps = numbers[0], numbers[1] or [0], numbers[2] or [1]
        if starts is None or len(starts) != 1 or len(axes) != 1 or steps != [1]:
            return None
        axis = axes[0] % len(before)
        start = starts[0] + before[axis] if starts[0] < 0 else min(starts[0], before[axis])
        return Piece(whole, axis, start, start + after[axis])

    def _numbers(self, node: Any, slot: int) -> list[int] | None:
        """A constant operand; None where it is absent or not constant."""
        if slot >= len(node.inputs) or not node.inputs[slot].name:
            return None
        content = self.view.constant(node.inputs[slot].name)
        return None if content is None else [int(n) for n in content.reshape(-1)]

    def joined(self, value: str, /) -> Joined[str] | None:
        node = self.view.node(value)
        sizes = self.sizes(value)
        if node is None or node.op != "Concat" or sizes is None:
            return None
        return Joined(tuple(t.name for t in node.inputs), node.attrs["axis"] % len(sizes))

    def sizes(self, value: str, /) -> tuple[int, ...] | None:
        shape = self.view.shape(value)
        return None if shape is None else tuple(d if isinstance(d, int) else 1 for d in shape)

    def flops(self, value: str, /) -> int:
        node = self.view.node(value)
        return (counting._flops(node) or 0) if node.outputs[0].name == value else 0

    def draws(self, value: str, /) -> bool:
        node = self.view.node(value)
        return node.op in _RANDOM or (node.op == "Dropout" and self.view.op(value) is None)

    def owner(self, value: str, /) -> str:
        return value

    def writes(self) -> Collection[str]:
        """Nothing in ONNX changes a tensor in place."""
        return ()


def _reads(node: Any) -> Iterator[str]:
    """Names that a node reads, and those that the graphs inside it read from outside themselves."""
    if node is None:
        return
    yield from (t.name for t in node.inputs if t.name)
    for inner in node.attrs.values():
        if isinstance(inner, gs.Graph):
            made = {t.name for n in inner.nodes for t in n.outputs} | {t.name for t in inner.inputs}
            read = [*(name for n in inner.nodes for name in _reads(n)), *(t.name for t in inner.outputs)]
            yield from (name for name in read if name not in made)
