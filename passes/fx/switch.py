"""Two networks as one flat graph, which computes the one that is asked for: what a solver of two networks loops over.

Both are flat already, and rewritten each for itself; inputs of the same name are the same input. The number of the
network, `solvers.names.WHICH`, is one more input, and a ``torch.cond`` on it holds a network in each branch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from hasten.errors import UsageError
from hasten.passes.fx.view import fake
from hasten.passes.solvers.names import WHICH

LABELS = ("first_network", "second_network")
_CONTIGUOUS = {"memory_format": torch.contiguous_format}


def switch(first: fx.GraphModule, second: fx.GraphModule, reads: Sequence[Sequence[str]]) -> fx.GraphModule:
    """Put both into one graph; ``reads`` names the inputs of each, in order.

    Inputs of the result: those of the first, then what the second has beside, then `WHICH` () int64, 0 or 1. Its
    output is the first output of the network that is asked, so these must have one size; `UsageError` otherwise.
    """
    networks = (first, second)
    made = [_result(network) for network in networks]
    if made[0].shape != made[1].shape:
        raise UsageError(
            f"the two networks of a solver return tensors of one size; these return {tuple(made[0].shape)} and "
            f"{tuple(made[1].shape)}"
        )
    dtype = made[0].dtype if made[0].dtype == made[1].dtype else torch.float32
    graph, root = fx.Graph(), nn.Module()
    inputs: dict[str, fx.Node] = {}
    for network, names in zip(networks, reads, strict=True):
        for name, node in zip(names, network.graph.find_nodes(op="placeholder"), strict=True):
            if name not in inputs:
                inputs[name] = graph.placeholder(name)
                inputs[name].meta["val"] = fake(node)
    which = graph.placeholder(WHICH)
    which.meta["val"] = torch.empty((), dtype=torch.int64, device=made[0].device)
    asked = graph.call_function(torch.ops.aten.eq.Scalar, (which, 0))
    asked.meta["val"] = torch.empty((), dtype=torch.bool, device=made[0].device)
    weights = [_weights(graph, network, label) for network, label in zip(networks, LABELS, strict=True)]
    operands = [*inputs.values(), *(node for held in weights for node in held.values())]
    for network, names, held, label in zip(networks, reads, weights, LABELS, strict=True):
        root.add_module(f"{label}_weights", network)
        branch = _branch(network, operands, {n: inputs[n] for n in names}, held, dtype)
        root.add_module(label, branch)
    branches = [graph.get_attr(label) for label in LABELS]
    cond = graph.call_function(torch.ops.higher_order.cond, (asked, *branches, tuple(operands)))
    value = made[0].new_empty(made[0].shape, dtype=dtype)
    cond.meta["val"] = (value,)
    result = graph.call_function(operator.getitem, (cond, 0))
    result.meta["val"] = value
    graph.output((result,))
    return fx.GraphModule(root, graph)


def _weights(graph: fx.Graph, network: fx.GraphModule, label: str) -> dict[str, fx.Node]:
    """Read the tensors that a network holds in the graph around it: branches are given what they read."""
    found: dict[str, fx.Node] = {}
    for node in network.graph.find_nodes(op="get_attr"):
        held = operator.attrgetter(node.target)(network)
        if isinstance(held, torch.Tensor) and node.target not in found:
            found[node.target] = graph.get_attr(f"{label}_weights.{node.target}")
            found[node.target].meta["val"] = fake(node) if isinstance(fake(node), torch.Tensor) else held
    return found


def _branch(
    network: fx.GraphModule,
    operands: Sequence[fx.Node],
    inputs: Mapping[str, fx.Node],
    weights: Mapping[str, fx.Node],
    dtype: torch.dtype,
) -> fx.GraphModule:
    graph = fx.Graph()
    own = {node: graph.placeholder(f"operand_{i}") for i, node in enumerate(operands)}
    for node, placeholder in own.items():
        placeholder.meta["val"] = fake(node)
    values: dict[fx.Node, Any] = {}
    names = iter(inputs)
    for node in network.graph.nodes:
        if node.op == "placeholder":
            values[node] = own[inputs[next(names)]]
        elif node.op == "get_attr" and node.target in weights:
            values[node] = own[weights[node.target]]
        elif node.op == "output":
            result = values[node.args[0][0]]
            if (value := _result(network)).dtype != dtype:
                result = graph.call_function(torch.ops.aten._to_copy.default, (result,), {"dtype": dtype})
                result.meta["val"] = value.new_empty(value.shape, dtype=dtype)
            copy = graph.call_function(torch.ops.aten.clone.default, (result,), _CONTIGUOUS)
            copy.meta["val"] = value.new_empty(value.shape, dtype=dtype)
            graph.output((copy,))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    return fx.GraphModule(network, graph)


def _result(network: fx.GraphModule) -> torch.Tensor:
    (output,) = network.graph.find_nodes(op="output")
    value = fake(output.args[0][0])
    if not isinstance(value, torch.Tensor):
        raise UsageError("a solver's network returns a tensor; this one's first output has no known size")
    return value
