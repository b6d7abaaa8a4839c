"""An `fx.GraphModule` under rewriting: its views, clean-up, structural checks and operator counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from hasten.errors import VerificationError
from hasten.passes.fx.aliasing import written
from hasten.passes.fx.call import mutates
from hasten.passes.fx.view import FxView, call_name, fake


class FxGraph:
    """A graph module and the graph modules inside it (branches of ``torch.cond``, loop bodies)."""

    ir = "fx"

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._unread = {n for inner in self.modules() for n in inner.graph.nodes if not n.users}
        """Calls that nothing read from the start are there for what they do: leaving a vmap, drawing a number."""
        for inner in self.modules():
            _drop_metadata_assertions(inner.graph)
            _free_shape_operands(inner.graph)
            _let_views_copy(inner.graph)

    def modules(self) -> Iterator[fx.GraphModule]:
        """Every graph module once, outermost first."""
        seen = set()
        for inner in self.module.modules():
            if isinstance(inner, fx.GraphModule) and id(inner.graph) not in seen and _has_calls(inner):
                seen.add(id(inner.graph))
                yield inner

    def views(self) -> Iterable[FxView]:
        return [FxView(m) for m in self.modules()]

    def clean(self) -> None:
        for inner in self.modules():
            inner.graph.eliminate_dead_code(is_impure_node=lambda n: n in self._unread or _is_impure(n))

    def finish(self) -> None:
        for inner in self.modules():
            inner.recompile()

    def check(self) -> None:
        for inner in self.modules():
            try:
                inner.graph.lint()
            except RuntimeError as error:
                raise VerificationError(f"the graph is not well formed: {error}") from error
            for node in inner.graph.nodes:
                if "hasten_rule" in node.meta and not _same_kind(node):
                    raise VerificationError(
                        f"{node.name}, made by {node.meta['hasten_rule']}, has no shape and type: a defect of the rule"
                    )

    def op_counts(self) -> dict[str, int]:
        counts = Counter(
            call_name(n) for m in self.modules() for n in m.graph.nodes if n.op in ("call_function", "call_method")
        )
        return dict(sorted(counts.items()))

    def text(self) -> str:
        return "\n".join(f"# {type(m).__name__}\n{m.graph.python_code('self').src}" for m in self.modules())


def _drop_metadata_assertions(graph: fx.Graph) -> None:
    """What export asserts of types on the way is what it found there itself, and each assertion is a user."""
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)):
        graph.erase_node(node)


def _free_shape_operands(graph: fx.Graph) -> None:
    """``x.expand_as(scores)`` reads the shape of ``scores``, not its content; it must not count as a user of it."""
    for node in list(graph.nodes):
        if call_name(node) not in ("expand_as", "type_as") or len(node.args) != 2:
            continue
        value = fake(node)
        if not isinstance(value, torch.Tensor) or not all(isinstance(d, int) for d in value.shape):
            continue
        expands = call_name(node) == "expand_as"
        node.op = "call_function"
        node.target = torch.ops.aten.expand.default if expands else torch.ops.aten.to.dtype
        node.args = (node.args[0], list(value.shape) if expands else value.dtype)


def _let_views_copy(graph: fx.Graph) -> None:
    """``x.view(sizes)`` fails on a memory layout that a fused operator may return; ``reshape`` copies there instead.

    Where memory is written to in place, a copy would lose the write: such views stay.
    """
    kept = written(graph, call_name)
    for node in graph.nodes:
        if node in kept or any(user in kept for user in node.users):
            continue
        if (
            node.op == "call_method"
            and node.target == "view"
            and isinstance(node.args[-1], (int, tuple, list, fx.Node))
        ):
            node.target = "reshape"
        elif node.op == "call_function" and node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _has_calls(module: fx.GraphModule) -> bool:
    return any(n.op in ("call_function", "call_method") for n in module.graph.nodes)


def _same_kind(node: fx.Node) -> bool:
    return isinstance(fake(node), torch.Tensor)


def _is_impure(node: fx.Node) -> bool:
    """Dead-code elimination must not drop in-place calls and assertions."""
    return node.is_impure() or mutates(node, call_name(node))
