"""Walking over the tensors of an onnx-graphsurgeon graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def tensors_of(graph: Any) -> Iterator[Any]:
    """Named tensors that a graph's inputs, outputs and own nodes mention, each once."""
    seen: set[int] = set()
    lists = [graph.inputs, *(part for node in graph.nodes for part in (node.inputs, node.outputs)), graph.outputs]
    for tensors in lists:
        for tensor in tensors:
            if tensor.name and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
