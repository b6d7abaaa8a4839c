"""Compare one rewritten site with what it replaces, on random inputs, before anything reads the new value."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from hasten.passes.fx.constants import held
from hasten.passes.fx.view import FxView, call_name, fake
from hasten.passes.pattern import Match

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the largest magnitude of the result, by the lowest precision on the way."""

LARGEST = 1 << 26
"""Elements of the largest tensor that a check may allocate."""


class SiteCheck:
    """A `hasten.passes.rule.Verifier` for FX graphs.

    Equal sites are checked once; ``unchecked`` counts those too large.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.unchecked = 0
        self._seen: dict[Hashable, str | None] = {}

    def __call__(self, view: FxView, old: fx.Node, new: fx.Node, found: Match[Any]) -> str | None:
        leaves = {n for new_node in view.fresh for n in new_node.all_input_nodes if n not in view.fresh}
        if new not in view.fresh:  # a value that was there before: what it holds is anything
            before, after = _slice(old, {new}), [new]
        else:
            before, after = _slice(old, leaves), _slice(new, leaves)
        nodes = list(dict.fromkeys(before + after))
        if any(_elements(n) > LARGEST for n in nodes):
            self.unchecked += 1
            return None
        key = _signature(view, before, after)
        if key not in self._seen:
            self._seen[key] = self._compare(view.module, nodes, old, new)
        return self._seen[key]

    def _compare(self, module: fx.GraphModule, nodes: Sequence[fx.Node], old: fx.Node, new: fx.Node) -> str | None:
        generator = torch.Generator().manual_seed(self.seed)
        results: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in nodes:
                results[node] = _run(module, node, results, generator)
        want, got = results[old], results[new]
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"the result is {tuple(got.shape)} {got.dtype}, it was {tuple(want.shape)} {want.dtype}"
        kinds = [r.dtype for r in results.values() if isinstance(r, torch.Tensor) and r.dtype in TOLERANCE]
        allowed = max((TOLERANCE[k] for k in kinds), default=0.0)
        wide = torch.float64 if want.dtype == torch.float64 or not want.is_floating_point() else torch.float32
        a, b = want.to(wide), got.to(wide)  # a difference of two numbers that agree is exact
        if not bool(a.isfinite().all()):
            known, finite = ~a.isnan(), a.isfinite()
            a, b, largest = a[known], b[known], _largest(a[finite])
        else:
            largest = _largest(a)
        error = _largest(a - b)
        if math.isnan(error) or error > allowed * max(largest, 1e-6):
            return f"the result differs by {error:.3g} where values reach {largest:.3g}"
        return None


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one, 0 of nothing."""
    return max(map(abs, map(float, values.aminmax()))) if values.numel() else 0.0


def _slice(root: fx.Node, leaves: set[fx.Node]) -> list[fx.Node]:
    """The nodes that make ``root`` from the leaves, in order; leaves and inputs included, nothing behind them."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        if not _is_leaf(node, leaves if node is not root else set()):
            stack.extend((n, False) for n in reversed(node.all_input_nodes))
    return order


def _is_leaf(node: fx.Node, leaves: set[fx.Node]) -> bool:
    return (
        node in leaves
        or node.op in ("placeholder", "get_attr")
        or not isinstance(fake(node), (torch.Tensor, tuple, list))
    )


def _elements(node: fx.Node) -> int:
    value = fake(node)
    return math.prod(_size(d) for d in value.shape) if isinstance(value, torch.Tensor) else 0


def _size(dim: Any) -> int:
    if isinstance(dim, int):
        return dim
    hint = dim.node.hint if hasattr(dim, "node") else None
    return int(hint) if hint is not None else 2


def _run(module: fx.GraphModule, node: fx.Node, results: dict[fx.Node, Any], generator: torch.Generator) -> Any:
    known = all(n in results for n in node.all_input_nodes)
    if node.op in ("call_function", "call_method") and known and isinstance(fake(node), (torch.Tensor, tuple, list)):
        args, kwargs = fx.map_arg((node.args, node.kwargs), results.__getitem__)
        kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)
    if node.op == "get_attr":
        found = held(module, node)
        if found is not None:
            return found
    return _random(fake(node), generator)


def _random(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return _size(value) if isinstance(value, (int, torch.SymInt)) else value
    shape = [_size(d) for d in value.shape]
    if value.dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.3
    if not value.dtype.is_floating_point:
        return torch.randint(-1, 3, shape, generator=generator).to(value.dtype)
    return torch.randn(shape, generator=generator).to(value.dtype)


def _signature(view: FxView, before: Sequence[fx.Node], after: Sequence[fx.Node]) -> Hashable:
    """Calls, attributes, shapes and types: what decides whether two sites are the same computation."""
    numbers: dict[fx.Node, int] = {}
    lines = []
    for node in (*before, *after):
        number = numbers.setdefault(node, len(numbers))
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers.get(n, '?')}")
        value = fake(node)
        kind = (str(value.dtype), *map(str, value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
        called = str(args) if node.op in ("call_function", "call_method") else ""
        lines.append((number, node.op, call_name(node), called, str(kind)))
    return tuple(lines)
