"""The rows of a sampler one behind another, where every decision of its step cache is known: no loop, no branch."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hasten.passes.fx import solver_row
from hasten.passes.fx.solver_loop import SolverLoop
from hasten.passes.fx.step_cache import COMPUTED
from hasten.passes.fx.view import fake
from hasten.passes.solvers import loop, names
from hasten.passes.solvers.plan import LoopPlan, Shaped


class UnrolledSampler(SolverLoop):
    """As `SolverLoop`, for ``bits``: 1 computes, 0 reuses, one a row.

    Without the inputs and outputs that only a loop or a decision needs: the rows to be done, what the step cache is
    told, and of its state what no row reads before it is written.
    """

    def __init__(
        self,
        denoiser: fx.GraphModule,
        plan: LoopPlan,
        reads: Sequence[str],
        writes: Sequence[str],
        kept: Sequence[Shaped],
        controls: Sequence[Shaped],
        bits: Sequence[bool],
    ) -> None:
        super().__init__(denoiser, plan, reads, writes, kept, controls)
        self.bits = tuple(bits)
        place = self.writes.index(COMPUTED)
        self._forms = {bit: decided(denoiser, bit, place) for bit in self.bits}  # weights are the denoiser's own
        read = {bit: _read(form, self.reads) for bit, form in self._forms.items()}
        self._unread = {c.name for c in controls if not any(c.name in found for found in read.values())}
        unread = {names.FIRST, names.STOP, names.FORCED, *self._unread}
        # what the first row writes without a look at it needs no beginning
        written = {s.name for s in kept if s.name not in read[self.bits[0]] and names.NEXT + s.name in self.writes}
        unread |= {name + branch for name in written for branch in names.BRANCHES}
        self.inputs = tuple(s for s in self.inputs if s.name not in unread)
        given = {s.name: s for s in self.inputs}
        self.outputs = names.outputs(plan, given, [n for n in (names.STATE, names.DECISIONS) if n in given])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Do all rows."""
        given = dict(zip((s.name for s in self.inputs), tensors, strict=True))
        given |= self._network_inputs(given)
        unread = given[names.STATE]
        held = {name: given.pop(name, unread) for name in self.carried}
        given |= dict.fromkeys(self._unread, unread)
        weights = self.denoiser.state_dict(keep_vars=True)
        networks = {bit: partial(_run, form, weights) for bit, form in self._forms.items()}
        preview = held[names.STATE][0]
        for number, bit in enumerate(self.bits):
            index = torch.full((), number, dtype=torch.int64, device=preview.device)
            held, preview = self._row(given, networks[bit], index, held, preview)
        result = solver_row.finished(given[loop.PREFIX + "output"], held[names.STATE], self._painting(given))
        ends = [held[s.name.removeprefix(names.NEXT)] for s in self.outputs[2:]]
        return result.clone(), preview.clone(), *(tensor.clone() for tensor in ends)


class _Reading(fx.Interpreter):
    """Runs a graph with other weights than its own."""

    def __init__(self, form: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        super().__init__(form)
        self.weights = weights

    def fetch_attr(self, target: str) -> Any:
        return self.weights[target] if target in self.weights else super().fetch_attr(target)


def _run(form: fx.GraphModule, weights: Mapping[str, Tensor], given: tuple[Tensor, ...]) -> Any:
    return _Reading(form, weights).run(*given)


def decided(module: fx.GraphModule, bit: bool, place: int) -> fx.GraphModule:
    """A copy of a denoiser in which output ``place``, its decision, is ``bit``, and no branch is left that asks it."""
    graph, values, parts = fx.Graph(), dict[fx.Node, Any](), dict[Any, list[Any]]()
    results: Any = module.graph.find_nodes(op="output")[0].args[0]
    compute = results[place]
    for node in module.graph.nodes:
        if node is compute:
            options = {"dtype": torch.bool, "device": fake(node).device}
            values[node] = graph.call_function(torch.ops.aten.full.default, ([], bit), options)
            values[node].meta = dict(node.meta)
        elif node.target is torch.ops.higher_order.cond and node.args[0] is compute:
            taken, operands = node.args[1 if bit else 2].target, [values[operand] for operand in node.args[3]]
            parts[node] = _inlined(graph, module.get_submodule(taken), operands)
        elif node.target is operator.getitem and node.args[0] in parts:
            values[node] = parts[node.args[0]][node.args[1]]
        elif node.op != "output":
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(fx.map_arg(results, values.__getitem__))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _inlined(graph: fx.Graph, branch: torch.nn.Module, operands: Sequence[fx.Node]) -> list[Any]:
    """Append a branch, which reads nothing but its operands, to ``graph``; returns its results."""
    assert isinstance(branch, fx.GraphModule)
    values = dict(zip(branch.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in branch.graph.nodes:
        if node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
    return list(fx.map_arg(branch.graph.find_nodes(op="output")[0].args[0], values.__getitem__))


def _read(form: fx.GraphModule, reads: Sequence[str]) -> set[str]:
    """Those of the inputs ``reads`` that a form of the denoiser looks at."""
    given = form.graph.find_nodes(op="placeholder")
    return {name for name, node in zip(reads, given, strict=True) if node.users}
