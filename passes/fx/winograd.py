"""``winograd-conv2d``: give every 3x3 convolution of an FX graph the implementation that is fastest for it.

Two steps: every site is described and a chooser answers, under the limits on memory and error that all sites share;
then the chosen ones are rewritten, with the norm before and the addition behind fused into the same pass over memory.
Weights that the graph holds are transformed now, in float64; weights that are inputs of it (torch.compile) at the
first call, and again when they change. Writes through ``.data`` or numpy to single numbers of a weight of more than
2**18 may go unnoticed (`hasten.passes.ops.winograd_conv2d` says what is compared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from hasten.passes.choice import DIRECT, Candidate, Choice, Layer, Limits, within_budget
from hasten.passes.fx import constants
from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.layers import layer_at
from hasten.passes.fx.view import FxView, fake
from hasten.passes.ops.native import build
from hasten.passes.ops.native.schemas import CHUNK_BYTES
from hasten.passes.ops.winograd_conv2d import select
from hasten.passes.pattern import GraphView, Match
from hasten.passes.pipeline import Context
from hasten.passes.rule import MissSite, Rule, RuleReport, apply
from hasten.passes.rules import norm_operands
from hasten.passes.rules import winograd_conv2d as rules

NAME = "winograd-conv2d"
BACKENDS = ("inductor", "aoti")


def run(graph: FxGraph, context: Context) -> RuleReport:
    """Run the pass over an FX graph that a CPU or CUDA backend of torch's compiles."""
    backend, _, device = context.target.partition(":")
    if backend not in BACKENDS:
        return RuleReport(NAME)
    if device == "cpu" and (why := build.load()) is not None:
        context.notes.append(f"{NAME}: convolutions keep the library's implementation, since {why}")
        return RuleReport(NAME)
    job = _Job(graph, context)
    job.choose()
    return job.tell(job.rewrite())


class _Job:
    def __init__(self, graph: FxGraph, context: Context) -> None:
        self.graph, self.context = graph, context
        self.device = context.target.partition(":")[2]
        self.limits: Limits = context.limits
        options = dict(context.options.get(NAME, {}))
        self.forced: str | None = options.pop("form", None)
        fuse = options.pop("fuse", True)
        self.views = list(graph.views())
        self.spellings = tuple(
            (n, p) for n, p in rules.spellings() if fuse or n in ("conv", "pad-conv", "upsample-conv")
        )
        self.choices: dict[tuple[int, fx.Node], Choice] = {}
        self.refusals: dict[fx.Node, str] = {}
        self.made: dict[tuple[int, fx.Node], fx.Node] = {}
        self.reasons: dict[tuple[int, fx.Node], str] = {}
        self.weights: dict[tuple[int, str, int, bool], fx.Node] = {}

    def choose(self) -> None:
        """One choice for each convolution, keyed by its node."""
        keys: list[tuple[int, fx.Node]] = []
        found: list[Choice] = []
        for number, view in enumerate(self.views):
            for node in view.values():
                layer = layer_at(view, node, torch.get_num_threads())
                if layer is None or isinstance(layer, str):
                    self.refusals[node] = layer or "no convolution"
                    continue
                if layer.device != self.device:
                    self.refusals[node] = f"it is computed on {layer.device}, and the target is {self.device}"
                    continue
                candidates, why = select.candidates(layer, self.limits, forced=self.forced)
                choice = _forced(layer, candidates, why) if self.forced else self.context.chooser(layer, candidates)
                if len(candidates) == 1 and why:
                    choice = replace(choice, reason=why)
                keys.append((number, node))
                found.append(choice)
        self.choices = dict(zip(keys, within_budget(found, self.limits.memory_budget), strict=True))

    def rewrite(self) -> RuleReport:
        report = RuleReport(NAME)
        for number, view in enumerate(self.views):
            rule = Rule(
                name=NAME,
                spellings=self.spellings,
                guard=partial(self._guard, number),
                replace=partial(self._replace, number),
                anchors=frozenset(),  # the table of choices says why a site keeps what it had,
                variant=partial(self._variant, number),
            )
            report += apply(rule, view, fuel=self.context.fuel, verify=self.context.verify)
        alive = [set(view.graph.nodes) for view in self.views]
        self.made = {key: new for key, new in self.made.items() if new in alive[key[0]]}  # others were taken back
        self._drop_weights()
        return report

    def tell(self, report: RuleReport) -> RuleReport:
        """Say which choices were carried out; the others are misses, each with its reason."""
        misses = []
        for (number, node), choice in self.choices.items():
            if choice.name != DIRECT and (number, node) not in self.made:
                why = self.reasons.get((number, node), "it was not reached, or its replacement was taken back")
                misses.append(MissSite(self.views[number].where(node), why))
                direct = Candidate(DIRECT, choice.direct_seconds)
                choice = Choice(choice.layer, direct, why, choice.direct_seconds, choice.measured_seconds)
            self.context.choices.append((node.name, choice))
        if self.made:
            self.context.notes.append(
                f"{len(self.made)} convolutions spread a NaN or an infinity over a whole tile; with strict-nan they "
                "keep the library's implementation"
            )
        return replace(report, misses=report.misses + tuple(misses))

    def _drop_weights(self) -> None:
        """Let go of weights that are only kept transformed now."""
        self.graph.clean()
        for number, name, *_ in self.weights:
            view = self.views[number]
            if any(n.op == "get_attr" and n.target == name for n in view.graph.nodes):
                continue
            *path, last = name.split(".")
            owner = view.module.get_submodule(".".join(path))
            if hasattr(owner, last):
                delattr(owner, last)

    def _variant(self, number: int, found: Match[Any]) -> str:
        return self.choices[number, found["conv"]].name

    def _guard(self, number: int, view: GraphView[Any], found: Match[Any]) -> str | None:
        choice = self.choices.get((number, found["conv"]))
        if choice is None:
            return self.refusals.get(found["conv"], "no choice was made for it")
        if choice.name == DIRECT:
            return choice.reason
        why = rules.obstacle(view, found, found["conv"])
        if why is None and self.device == "cpu" and "norm_groups" in found.attrs:
            why = norm_operands.unfit(view, found, rules.NORM_PREFIX)
        if why is not None:
            self.reasons[number, found["conv"]] = why
        return why

    def _replace(self, number: int, view: FxView, found: Match[Any], root: fx.Node) -> fx.Node:
        choice = self.choices[number, found["conv"]]
        form = select.form(choice.name)
        assert form is not None
        x, norm, act_in = found["x"], None, "none"
        if "norm_groups" in found.attrs:
            operands = [x, *norm_operands.values(found, rules.NORM_PREFIX)]
            attrs = {"groups": found.attrs["norm_groups"], "eps": found.attrs["norm_eps"]}
            norm, act_in = view.emit("group_norm_affine", operands, attrs, at=root), found.attrs["norm_act"]
        pads, mode = rules.padding(found)
        attrs = {
            "outputs": choice.layer.outputs,
            "tile": form.tile,
            "phases": form.phases,
            "padding": pads,
            "padding_mode": mode,
            "act_in": act_in,
            "act_out": "silu" if (last := view.op(root)) is not None and last.name == "silu" else "none",
            "workspace": CHUNK_BYTES,
        }
        weight = self._weight(view, found["weight"], form, number)
        inputs = [x, weight, found.values["bias"], norm, found.values.get("other")]
        made = view.emit("winograd_conv2d", inputs, attrs, at=root)
        self.made[number, found["conv"]] = made
        return made

    def _weight(self, view: FxView, weight: fx.Node, form: select.Form, number: int) -> fx.Node:
        """The transformed weights, where the graph holds the weights; the weights where they come in from outside."""
        held = constants.held(view.module, weight) if weight.op == "get_attr" else None
        if held is None:
            return weight
        key = (number, str(weight.target), form.tile, form.phases)
        if key not in self.weights:
            with torch.no_grad():
                made = torch.ops.hasten.winograd_weight(held.to(fake(weight).device), form.tile, form.phases)
            first = next(n for n in view.graph.nodes if n.op not in ("placeholder", "get_attr"))
            self.weights[key] = view.emit_buffer(made, at=first, like=weight)
        return self.weights[key]


def _forced(layer: Layer, candidates: Sequence[Candidate], why: str) -> Choice:
    chosen = candidates[-1]
    return Choice(layer, chosen, why or "asked for by name", candidates[0].predicted_seconds)
