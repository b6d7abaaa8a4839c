"""The HTML page of ``hasten inspect --html``: one file, no scripts, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import hasten
from hasten.backends.shapes import format_shape
from hasten.passes import catalog
from hasten.passes.cost import Cost, total
from hasten.passes.rule import RuleReport
from hasten.tools.console import duration, quantity
from hasten.tools.files import replace_text
from hasten.tools.report import CHOICES, Findings, choice_rows

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a90d9; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; }
.card b { display: block; font-size: 1.25rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code, .site { font-family: ui-monospace, monospace; font-size: .85em; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; } .quiet { opacity: .7; }
.bar { background: var(--bar); height: .6rem; border-radius: .2rem; display: inline-block; }
.bad { background: #d9534f33; }
"""


def write(found: Findings, path: Path) -> None:
    """Write the page."""
    replace_text(path, render(found))


def render(found: Findings) -> str:
    """The page as text."""
    found.settle()
    report = found.report
    title = f"{report.source} for {report.target}"
    body = [
        f"<h1>{escape(report.source)}</h1>",
        f'<p class="quiet">{escape(report.ir)} graph for {escape(report.target)}, hasten {hasten.__version__}</p>',
        _cards(found),
        "<h2>Inputs and outputs</h2>",
        _table(
            ("", "name", "type", "shape"),
            [
                (side, t.name, t.dtype, format_shape(t.shape))
                for side, specs in (("input", found.inputs), ("output", found.outputs))
                for t in specs
            ],
        ),
        "<h2>Rules</h2>",
        _table(
            ("rule", "#sites", "#expected", "variants", "#near misses", "#taken back"),
            [
                (
                    r.name,
                    str(r.hits),
                    str(found.expected.get(r.name, 0)) if found.expected else "",
                    _variants(r),
                    str(len(r.misses)),
                    str(len(r.reverted)),
                )
                for r in report.rules
            ],
        ),
        *(_rule(r) for r in report.rules),
        "<h2>Operators</h2>",
        _operators(found),
    ]
    if rows := choice_rows(report):
        columns = [f"#{c[1:]}" if c.startswith(">") else c for c in CHOICES]
        body += ["<h2>Implementations</h2>", _table(columns, rows)]
    if report.notes:
        body += ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(n)}</li>" for n in report.notes), "</ul>"]
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        )
    )


def _cards(found: Findings) -> str:
    report = found.report
    cards = [(f"{sum(report.ops_before.values())} → {sum(report.ops_after.values())}", "nodes")]
    cards.append((str(sum(r.hits for r in report.rules)), "rewrites"))
    if report.flops is not None and report.bytes is not None:
        cards.append((quantity(report.flops, ""), "floating-point operations"))
        after = f" → {quantity(total(found.after).bytes, 'B')}" if found.after else ""
        cards.append((quantity(report.bytes, "B") + after, "read and written by unfused operators"))
    if found.weight_bytes is not None:
        cards.append((quantity(found.weight_bytes, "B"), "weights"))
    cards.append(
        (duration(sum(s for name, s in report.seconds.items() if name in catalog.names())), "time of the passes")
    )
    inside = "".join(f'<div class="card"><b>{escape(value)}</b>{escape(name)}</div>' for value, name in cards)
    return f'<div class="cards">{inside}</div>'


def _variants(rule: RuleReport) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in Counter(s.variant for s in rule.sites).items() if kind)


def _rule(rule: RuleReport) -> str:
    if not (rule.sites or rule.misses or rule.reverted):
        return ""
    counted = f"{escape(rule.name)}: {rule.hits} sites, {len(rule.misses)} near misses"
    parts = [f"<details{' open' if rule.reverted else ''}><summary>{counted}</summary>"]
    if rule.reverted:
        rows = [(m.where, m.reason) for m in rule.reverted]
        parts.append(_table(("taken back at", "because"), rows, row_class="bad"))
    if rule.misses:
        parts.append(_table(("near miss at", "because"), [(m.where, m.reason) for m in rule.misses]))
    if rule.sites:
        parts.append(_table(("site", "variant", "spelling"), [(s.where, s.variant, s.spelling) for s in rule.sites]))
    return "\n".join((*parts, "</details>"))


def _operators(found: Findings) -> str:
    before, after = found.report.ops_before, found.report.ops_after
    none = Cost(0, 0, 0)
    flops = {n: found.before.get(n, none).flops or found.after.get(n, none).flops for n in {*before, *after}}
    names = sorted(flops, key=lambda n: (-flops[n], -before.get(n, 0), n))
    most = max(flops.values(), default=0)
    head = "".join(
        f'<th class="n">{h}</th>' if i else f"<th>{h}</th>"
        for i, h in enumerate(("operator", "before", "after", "FLOPs", "bytes before", "bytes after"))
    )
    rows = []
    for name in names:
        old, new = found.before.get(name, none), found.after.get(name, none)
        bar = f'<span class="bar" style="width:{100 * flops[name] / most:.1f}%"></span>' if most and flops[name] else ""
        cells = [str(before.get(name, 0)), str(after.get(name, 0))]
        cells += [quantity(v, u) if v else "" for v, u in ((flops[name], ""), (old.bytes, "B"), (new.bytes, "B"))]
        numbers = "".join(f'<td class="n">{escape(c)}</td>' for c in cells)
        rows.append(f'<tr><td><code>{escape(name)}</code></td>{numbers}<td style="width:20%">{bar}</td></tr>')
    return f"<table><thead><tr>{head}<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, row_class: str = "") -> str:
    """Columns whose name starts with ``#`` hold numbers."""
    kinds = [' class="n"' if c.startswith("#") else ' class="site"' for c in columns]
    head = "".join(
        f"<th{k if 'n' in k[7:9] else ''}>{escape(c.lstrip('#'))}</th>" for c, k in zip(columns, kinds, strict=True)
    )
    mark = f' class="{row_class}"' if row_class else ""
    body = "".join(
        f"<tr{mark}>" + "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
