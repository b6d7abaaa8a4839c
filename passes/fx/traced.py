"""A pure function of arrays as nodes of a graph: traced on the values' fakes, and copied in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from hasten.errors import HastenError
from hasten.passes.fx.view import fake


def inline(graph: fx.Graph, function: Callable[..., Any], *operands: Any, rule: str = "step-cache") -> Any:
    """Append ``function(*operands)`` to ``graph`` and return its result, nodes in place of tensors.

    ``operands`` and the result are pytrees; nodes in them stand for the tensors that they make, everything else is
    passed as it is. The function may use nothing but its operands and Python numbers; an operand that it returns
    untouched comes back as the same node. Every new node carries ``rule`` and its fake value.
    """
    leaves, spec = _pytree.tree_flatten(operands)
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    values = [fake(node) for node in nodes]
    if unknown := [n.name for n, v in zip(nodes, values, strict=True) if not isinstance(v, torch.Tensor)]:
        raise HastenError(f"{unknown[0]} has no known shape and type, so nothing can be computed from it")
    passed: dict[int, int] = {}
    result_spec: Any = None

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        nonlocal result_spec
        own = dict(zip(nodes, tensors, strict=True))
        passed.update({id(t): i for i, t in enumerate(tensors)})
        filled = [own[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        result = function(*_pytree.tree_unflatten(filled, spec))
        made, result_spec = _pytree.tree_flatten(result)
        return [t for t in made if isinstance(t, torch.Tensor)]

    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    with torch.no_grad():
        if mode is None:
            traced = make_fx(flat, tracing_mode="fake")(*values)
        else:
            with mode:
                traced = make_fx(flat)(*values)
    copies: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            raise HastenError(
                "a step-cache function made a tensor of its own; it may use its operands and numbers only"
            )
        if node.op == "output":
            made = [copies[n] for n in node.args[0]]
            return _pytree.tree_unflatten(made, result_spec)
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.meta = {"val": node.meta["val"], "hasten_rule": rule}
        copies[node] = copy
    raise AssertionError("a traced graph ends in its output")
