"""A graph that tells what a step cache's calibration needs: how its values move from call to call, as numbers.

The instrumented graph has the original inputs, then the last K of each watched value; and the original outputs, then
for each watched value the value itself, which becomes the last, and its reductions. So a run keeps K copies of what it
watches and nothing else, however many steps it has.
"""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hasten.errors import HastenError
from hasten.passes.steps.fitting import Floats, Moves, Sample

if TYPE_CHECKING:
    from torch import fx

    from hasten.backends.region import Found
    from hasten.passes.fx.step_cache import Cut
    from hasten.passes.steps.policy import Policy

Watched = Mapping[str, tuple["fx.Node", "fx.Node | None"]]
"""Values by name: a node, or what a node has gained over another."""
MODULE = "module:"
"""Begins the names of module outputs: ``module:KIND:NUMBER``."""


def watch(module: fx.GraphModule, found: Found[Cut], policy: Policy) -> Watched:
    """What to watch for ``policy``: its signal, what its payload keeps, and the model's input and output."""
    from hasten.passes.fx.view import fake

    cut, watched = found.cut, {}
    (written,) = module.graph.find_nodes(op="output")
    output = written.all_input_nodes[0]
    kind = fake(output)
    like = [n for n in module.graph.find_nodes(op="placeholder") if getattr(fake(n), "shape", None) == kind.shape]
    if like:
        watched["input"] = (like[0], None)
    watched["output"] = (output, None)
    if policy.granularity == "modules":
        for number, after in enumerate(cut.after):
            watched[f"{MODULE}{_kind(after)}:{number}"] = (after, None)
        return watched
    same = fake(cut.before[0]).shape == fake(cut.after[0]).shape
    if same:
        watched["residual"] = (cut.after[0], cut.before[0])
    watched["value"] = (cut.after[0], None)
    if cut.signal is not None and policy.decision.signal != "input":
        watched["signal"] = (cut.signal, cut.signal_base)
    return watched


def _kind(node: fx.Node) -> str:
    """The kind of module that a node belongs to, by the name that it has in a block: ``attn1``, ``ff``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    named = re.findall(r"blocks\.\d+\.([A-Za-z_]\w*)", stack[-1][0]) if stack else []
    return named[-1] if named else "module"


class Recorder:
    """Call it in the model's place, once a step; `sample` then is what the run showed.

    ``distance`` is K. ``module`` is a flat graph: tensors in, a tuple of tensors out.
    """

    def __init__(self, module: fx.GraphModule, watched: Watched, distance: int) -> None:
        self.watched, self.distance = tuple(watched), distance
        self.outputs = len(module.graph.find_nodes(op="output")[0].args[0])
        self._like = {name: _example(node) for name, (node, _) in watched.items()}
        self._tokens = "residual" if "residual" in watched else None
        self.module = _instrument(module, watched, distance, self._tokens)
        self.restart()

    def restart(self) -> None:
        """Begin another run."""
        zeros = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in self._like.items()}
        self._past = {name: deque([zeros[name]] * self.distance, self.distance) for name in self.watched}
        self._rows: dict[str, list[Any]] = {name: [] for name in self.watched}
        self._ratios: list[float] = []

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Run one step and return the model's first output."""
        past = [tensor for name in self.watched for tensor in self._past[name]]
        results = self.module(*tensors, *past)
        told = results[self.outputs :]
        for i, name in enumerate(self.watched):
            self._past[name].appendleft(told[2 * i])
            self._rows[name].append(told[2 * i + 1].double().numpy())
        if self._tokens is not None:
            self._ratios.append(float(told[-1]))
        output: torch.Tensor = results[0]
        return output

    def sample(self, seed: int, label: str) -> Sample:
        """Reduce the run: `HastenError` where a value was not finite."""
        curves = {name: _moves(np.array(rows)) for name, rows in self._rows.items()}
        ratios = np.array([1.0, *self._ratios[1:]] if self._ratios else [])
        kinds: dict[str, list[Floats]] = {}
        for name, moves in curves.items():
            if name.startswith(MODULE):
                kinds.setdefault(name.split(":")[1], []).append(_to_later(moves))
        values = {name: moves for name, moves in curves.items() if not name.startswith(MODULE)}
        errors = {kind: np.mean(rows, axis=0) for kind, rows in kinds.items()}
        made = Sample(seed, label, values, ratios, errors)
        made.check_finite()
        return made


def _moves(rows: Floats) -> Moves:
    """(N, 1 + K) sizes and differences; those from before the run began are not there."""
    moves = rows[:, 1:].T.copy()
    for apart in range(1, len(moves) + 1):
        moves[apart - 1, :apart] = np.nan
    return Moves(rows[:, 0].copy(), moves)


def _to_later(moves: Moves) -> Floats:
    """(K, N) of ``mean|V(n) - V(n + k)| / mean|V(n + k)|``, NaN where n + k is past the run."""
    errors = np.full_like(moves.moves, np.nan)
    steps = len(moves.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        for apart in range(1, min(len(errors), steps - 1) + 1):
            errors[apart - 1, : steps - apart] = moves.moves[apart - 1, apart:] / moves.size[apart:]
    return errors


def _instrument(module: fx.GraphModule, watched: Watched, distance: int, tokens: str | None) -> fx.GraphModule:
    from hasten.passes.fx.traced import inline
    from hasten.passes.fx.view import fake

    graph = torch.fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    written = graph.graph_copy(module.graph, copies)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    mode = next(fake(n).fake_mode for n in graph.find_nodes(op="placeholder"))
    told: list[fx.Node] = []
    pasts: dict[str, list[fx.Node]] = {}
    for name, (node, _) in watched.items():
        pasts[name] = []
        for apart in range(1, distance + 1):
            with graph.inserting_after(last):
                last = graph.placeholder(f"past_{len(pasts)}_{apart}")
            shape, dtype = _example(node)
            with mode:
                last.meta["val"] = torch.empty(shape, dtype=dtype)
            pasts[name].append(last)
    for name, (node, base) in watched.items():
        value = copies[node]
        if base is not None:
            value = inline(graph, operator.sub, value, copies[base], rule="calibrate")
        told += [value, inline(graph, _reduced, value, pasts[name], rule="calibrate")]
        if name == tokens:
            magnitude = inline(graph, _magnitude, value, pasts[name][0], rule="calibrate")
    graph.output((*written, *told, *([magnitude] if tokens is not None else [])))
    graph.lint()
    return torch.fx.GraphModule(module, graph)


def _reduced(value: torch.Tensor, past: Sequence[torch.Tensor]) -> torch.Tensor:
    """``mean|value|``, then ``mean|value - past|`` of each: (1 + K,) float32."""
    wide = value.float()
    return torch.stack([wide.abs().mean(), *((wide - p.float()).abs().mean() for p in past)])


def _magnitude(value: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of ``|value|_2 / |past|_2``; channels are last in (B, T, C), second in maps."""
    axis = -1 if value.ndim <= 3 else 1
    new, old = value.float().norm(dim=axis), past.float().norm(dim=axis)
    return (new / old).mean()


def _example(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    from hasten.passes.fx.view import fake

    value = fake(node)
    if any(not isinstance(size, int) for size in value.shape):
        raise HastenError(f"{node.name} has the size {tuple(value.shape)}, which must be known to record a model")
    return tuple(value.shape), value.dtype
