"""A pipeline is an ordered tuple of named passes; one hook runs before the first, between, and after the last."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hasten.errors import UsageError, nearest
from hasten.passes import catalog
from hasten.passes.choice import Choice, Chooser, Limits, fastest_predicted
from hasten.passes.pattern import GraphView
from hasten.passes.rule import Fuel, Report, Rule, RuleReport, Verifier, apply


class Graph(Protocol):
    """An FX or ONNX graph under rewriting: `passes.fx.graph.FxGraph`, `passes.onnx.graph.OnnxGraph`."""

    ir: str

    def views(self) -> Iterable[GraphView[Any]]:
        """The main graph and every nested one (branches, loop bodies, local functions), outermost first."""

    def clean(self) -> None:
        """Remove nodes that nothing reads and restore topological order."""

    def finish(self) -> None:
        """Make the graph runnable again; called once, after the last pass."""

    def check(self) -> None:
        """Raise `VerificationError` naming the node and what is wrong with it."""

    def op_counts(self) -> dict[str, int]:
        """How many nodes of each operator there are, nested graphs included."""

    def text(self) -> str:
        """The graph as text, for dumps."""


class GraphPass(Protocol):
    """A pass that is not a rule: a whole-graph step such as `canonical` or `legalise`."""

    name: str

    def run(self, graph: Any, context: Context) -> RuleReport: ...


@dataclass
class Context:
    """What passes may know beside the graph: the target's support table, fuel, site verification, and options."""

    target: str = ""
    supports: Callable[..., str | None] = lambda op, dtype, **_: None
    fuel: Fuel = field(default_factory=Fuel)
    verify: Verifier | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    chooser: Chooser = fastest_predicted
    choices: list[tuple[str, Choice]] = field(default_factory=list)
    """Which implementation each site got, by the name of its node."""
    notes: list[str] = field(default_factory=list)


Hook = Callable[[int, str, Graph], None]
_STEP = re.compile(r"([a-z0-9][a-z0-9-]*)(?:\{([^{}]*)\})?")


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read ``"gelu,attention{causal=false}"`` into names and options.

    >>> parse("gelu,attention{max_rank=4}")
    [('gelu', {}), ('attention', {'max_rank': 4})]
    """
    steps, rest = [], text.strip()
    while rest:
        found = _STEP.match(rest)
        if found is None:
            raise UsageError(f"passes: cannot read {rest!r} in {text!r}; write names as 'gelu,attention{{key=value}}'")
        name, options = found[1], found[2]
        known = catalog.names()
        if name not in known:
            raise UsageError(f"passes: no pass named {name!r}; passes: {', '.join(known)}.{nearest(name, known)}")
        steps.append((name, _options(name, options)))
        rest = rest[found.end() :]
        if rest and not rest.startswith(","):
            raise UsageError(f"passes: expected ',' before {rest!r} in {text!r}")
        rest = rest.removeprefix(",")
    return steps


def _options(name: str, text: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in (text or "").replace(",", " ").split():
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"passes: option {item!r} of {name} is not written key=value")
        options[key] = _literal(value)
    return options


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def run(
    graph: Graph,
    steps: Sequence[tuple[str, Mapping[str, Any]]],
    context: Context,
    report: Report,
    *,
    skip: Iterable[str] = (),
    hook: Hook | None = None,
) -> Report:
    """Run named passes over ``graph``; after each the graph is cleaned and checked.

    ``report`` is extended and returned.
    """
    skipped, known = set(skip), catalog.names()
    for name in skipped:
        if name not in known:
            raise UsageError(f"skip: no pass named {name!r}; passes: {', '.join(known)}.{nearest(name, known)}")
    graph.check()
    report.ops_before = report.ops_before or graph.op_counts()
    if hook is not None:
        hook(0, "input", graph)
    for number, (name, options) in enumerate(steps, 1):
        if name in skipped:
            continue
        step = catalog.load(name)
        started = time.perf_counter()
        context.options = {**context.options, name: options}
        if isinstance(step, Rule):
            if options:
                raise UsageError(f"passes: {name} has no options, got {', '.join(options)}")
            result = RuleReport(name)
            for view in graph.views():
                result += apply(step, view, fuel=context.fuel, verify=context.verify)
        else:
            result = step.run(graph, context)
        if not isinstance(step, Rule) or result.sites or result.reverted:
            graph.clean()
            graph.check()
        report.add(result)
        report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - started
        if hook is not None:
            hook(number, name, graph)
    graph.finish()
    report.choices.extend({"site": where, **choice.as_dict()} for where, choice in context.choices)
    report.notes.extend(context.notes)
    report.ops_after = graph.op_counts()
    return report


def dump_to(folder: Path) -> Hook:
    """A hook that writes the graph after every pass as ``NN-name.txt``."""
    folder.mkdir(parents=True, exist_ok=True)

    def hook(number: int, name: str, graph: Graph) -> None:
        (folder / f"{number:02d}-{name}.txt").write_text(graph.text())

    return hook
