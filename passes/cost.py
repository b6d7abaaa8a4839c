"""What a graph's operators cost: `passes.fx.flops` and `passes.onnx.flops` count it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """``count`` nodes of one operator: their floating-point operations, and the bytes that they read and write."""

    count: int
    flops: int
    bytes: int


def add(costs: dict[str, Cost], name: str, cost: Cost) -> None:
    """Count ``cost`` among those of operator ``name``."""
    before = costs.get(name, Cost(0, 0, 0))
    costs[name] = Cost(before.count + cost.count, before.flops + cost.flops, before.bytes + cost.bytes)


def total(costs: Mapping[str, Cost]) -> Cost:
    """Everything together.

    >>> total({"Conv": Cost(2, 10, 4), "Relu": Cost(1, 0, 2)})
    Cost(count=3, flops=10, bytes=6)
    """
    rows = costs.values()
    return Cost(sum(c.count for c in rows), sum(c.flops for c in rows), sum(c.bytes for c in rows))
