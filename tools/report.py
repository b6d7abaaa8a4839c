"""A rewrite's report for people (tables) and for programs (the JSON of ``inspect``, ``optimize`` and ``build``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from hasten.passes import catalog
from hasten.passes.cost import Cost, total
from hasten.passes.rule import Report
from hasten.tools.console import duration, quantity, table

if TYPE_CHECKING:
    from hasten.backends.manifest import TensorSpec

MISSES = 12
"""Near misses of one rule that are shown without -v; reasons that are equal share a line."""


@dataclass
class Findings:
    """A report, and what was counted around it. ``before`` and ``after``: costs by operator; both may be empty."""

    report: Report
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    before: Mapping[str, Cost] = field(default_factory=dict)
    after: Mapping[str, Cost] = field(default_factory=dict)
    weight_bytes: int | None = None
    expected: Mapping[str, int] = field(default_factory=dict)

    def settle(self) -> None:
        """Put the totals into the report. Rewrites compute the same thing: operations are those of the source."""
        if self.before:
            self.report.flops = total(self.before).flops
            self.report.bytes = total(self.before).bytes

    def as_dict(self) -> dict[str, Any]:
        """The shared schema, and what only costs can tell."""
        self.settle()
        document = self.report.as_dict()
        document["bytes_after"] = total(self.after).bytes if self.after else None
        document["weight_bytes"] = self.weight_bytes
        document["inputs"] = [t.as_dict() for t in self.inputs]
        document["costs"] = {
            name: {"count": c.count, "flops": c.flops, "bytes": c.bytes} for name, c in sorted(self.before.items())
        }
        return document


def rules_table(report: Report, expected: Mapping[str, int] | None = None) -> RenderableType:
    """One row a rule: sites, their variants, near misses, sites that did not verify."""
    expected = expected or {}
    shown = table("rule", ">sites", *([">expected"] if expected else []), "variants", ">near misses", ">taken back")
    for rule in report.rules:
        kinds = Counter(s.variant for s in rule.sites)
        variants = ", ".join(f"{kind} {count}" for kind, count in kinds.items() if kind)
        wanted = [str(expected.get(rule.name, 0))] if expected else []
        shown.add_row(rule.name, str(rule.hits), *wanted, variants, str(len(rule.misses)), str(len(rule.reverted)))
    return shown


def misses_table(report: Report, *, everything: bool = False) -> RenderableType | None:
    """Why rules nearly fired and did not; None where there is nothing to say."""
    shown = table("rule", "near miss at", "reason")
    for rule in report.rules:
        for miss in rule.reverted:
            shown.add_row(rule.name, miss.where, f"taken back: {miss.reason}")
        left = rule.misses if everything else rule.misses[:MISSES]
        for miss in left:
            shown.add_row(rule.name, miss.where, miss.reason)
        if len(left) < len(rule.misses):
            shown.add_row(rule.name, f"… {len(rule.misses) - len(left)} more", "-v shows them")
    return shown if shown.row_count else None


def operators_table(found: Findings, *, limit: int | None = None) -> RenderableType:
    """Operators before and after, those that cost most first."""
    before, after = found.report.ops_before, found.report.ops_after
    names = sorted(
        {*before, *after},
        key=lambda n: (-found.before.get(n, found.after.get(n, Cost(0, 0, 0))).flops, -before.get(n, 0), n),
    )
    shown = table("operator", ">before", ">after", ">FLOPs", ">bytes before", ">bytes after")
    for name in names[:limit]:
        old, new = found.before.get(name, Cost(0, 0, 0)), found.after.get(name, Cost(0, 0, 0))
        shown.add_row(
            name,
            str(before.get(name, 0)),
            str(after.get(name, 0)),
            *(
                quantity(n, u) if n else ""
                for n, u in ((old.flops or new.flops, ""), (old.bytes, "B"), (new.bytes, "B"))
            ),
        )
    if limit is not None and len(names) > limit:
        shown.add_row(f"… {len(names) - limit} more", "", "", "", "", "")
    return shown


def heading(found: Findings) -> str:
    """What was read, for which target, and what it costs."""
    found.settle()
    report = found.report
    from hasten.backends.shapes import format_shape

    lines = [f"{report.source} ({report.ir}) for {report.target}"]
    for side, specs in (("input", found.inputs), ("output", found.outputs)):
        lines += [f"  {side:6}  {t.name}  {t.dtype} {format_shape(t.shape)}" for t in specs]
    if report.flops is not None and report.bytes is not None:
        traffic = quantity(report.bytes, "B")
        if found.after:
            traffic += f" -> {quantity(total(found.after).bytes, 'B')}"
        lines.append(f"  {quantity(report.flops, 'FLOP')}, {traffic} read and written by unfused operators")
    if found.weight_bytes is not None:
        lines.append(f"  {quantity(found.weight_bytes, 'B')} of weights")
    nodes = sum(report.ops_before.values()), sum(report.ops_after.values())
    passes = duration(sum(seconds for name, seconds in report.seconds.items() if name in catalog.names()))
    lines.append(f"  {nodes[0]} nodes -> {nodes[1]}, passes took {passes}")
    return "\n".join(lines)


CHOICES = ("layer", ">sites", "implementation", ">predicted", ">measured", ">weights", ">workspace", "why")
"""Columns of `choice_rows`; ``>`` marks numbers."""
LAYERS = 24
"""Rows that are shown without -v."""


def choice_rows(report: Report) -> list[tuple[str, ...]]:
    """Which implementation each layer got, equal layers in one row."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for choice in report.choices:
        alike.setdefault((choice["layer"], choice["implementation"], choice["reason"]), []).append(choice)
    rows: list[tuple[str, ...]] = []
    for (layer, name, reason), same in alike.items():
        first = same[0]
        measured = (first["measured_seconds"] or {}).get(name)
        rows.append(
            (
                layer.partition(", float")[0],
                str(len(same)),
                name,
                duration(first["predicted_seconds"]),
                duration(measured) if measured is not None else "",
                quantity(first["weight_bytes"], "B") if first["weight_bytes"] else "",
                quantity(first["workspace_bytes"], "B") if first["workspace_bytes"] else "",
                reason,
            )
        )
    return rows


def choices_table(report: Report, *, everything: bool = False) -> RenderableType | None:
    """`choice_rows` for a terminal; None where nothing was chosen."""
    rows = choice_rows(report)
    if not rows:
        return None
    shown = table(*CHOICES)
    left = rows if everything else rows[:LAYERS]
    for row in left:
        shown.add_row(*row)
    if len(left) < len(rows):
        shown.add_row(f"… {len(rows) - len(left)} more", *[""] * (len(CHOICES) - 2), "-v shows them")
    return shown
