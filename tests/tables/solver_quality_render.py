"""The tables and the plot of what ``solver_quality.py`` measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solver_quality import LABELS, STEPS

MARKS = {"solvers": "solver-quality", "guided": "guided", "caf": "caf"}
Row = dict[str, Any]


def render(jsonl: Path, into: Path | None, plot: Path | None) -> int:
    """Write each table between its marks; 1 where nothing was measured."""
    rows = [json.loads(line) for line in jsonl.read_text(encoding="utf-8").splitlines()] if jsonl.exists() else []
    if not rows:
        print(f"{jsonl}: nothing was measured", file=sys.stderr)
        return 1
    for kind, make in (("solvers", fewest), ("guided", guided), ("caf", constant_acceleration)):
        own = [r for r in rows if r["kind"] in (kind, "marks" if kind == "solvers" else kind)]
        if not own:
            continue
        text = make(own)
        print(f"{text}\n")
        begin, end = f"<!-- {MARKS[kind]} -->", f"<!-- /{MARKS[kind]} -->"
        if into is not None:
            whole = into.read_text(encoding="utf-8")
            if begin not in whole:
                print(f"{into} has no {begin}", file=sys.stderr)
                return 1
            before, _, rest = whole.partition(begin)
            into.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    if plot is not None:
        draw([r for r in rows if r["kind"] in ("solvers", "marks")], plot)
    return 0


def name_of(text: str) -> str:
    """The solver's name without the options that all share."""
    return LABELS.get(text, text.partition(":")[0])


def reached(rows: Sequence[Row], key: str, mark: float) -> Row | None:
    """The row of fewest evaluations whose ``key`` is at least ``mark``."""
    good = [r for r in rows if r[key] is not None and r[key] >= mark]
    return min(good, key=lambda r: r["evaluations"], default=None)


def references(rows: Sequence[Row]) -> dict[str, Row]:
    """250 steps of the plain solver, by model, with what 95 % of it is."""
    marks = {r["model"]: r for r in rows if r["kind"] == "marks"}
    return {r["model"]: {**r, "marks": marks[r["model"]]} for r in rows if r.get("evaluations") == STEPS}


def measured(rows: Sequence[Row]) -> list[Row]:
    """The solvers, without the reference."""
    return [r for r in rows if r["kind"] == "solvers" and r["evaluations"] != STEPS]


def fewest(rows: Sequence[Row]) -> str:
    """One row a solver: the fewest evaluations of each model by each measure, and what it has with ten."""
    plain, rows = references(rows), measured(rows)
    head = ["solver"]
    for model in plain:
        head += [f"{model}: right", "fidelity", "PSNR dB (with)"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    texts = list(dict.fromkeys(name_of(r["solver"]) for r in rows))
    for text in texts:
        cells = [text]
        for model, mark in plain.items():
            own = [r for r in rows if r["model"] == model and name_of(r["solver"]) == text]
            if not own:
                cells += ["-", "", ""]
                continue
            cells.append(_count(reached(own, "right", mark["marks"]["right"]), own))
            if all(r["psnr_db"] is None for r in own):
                cells += ["adds noise", ""]
                continue
            cells.append(_count(reached(own, "psnr_db", mark["marks"]["psnr_db"]), own))
            ten = max((r for r in own if r["evaluations"] <= 10), key=lambda r: r["evaluations"], default=None)
            cells.append("" if ten is None else f"{ten['psnr_db']:.1f} ({ten['evaluations']})")
        lines.append(f"| {' | '.join(cells)} |")
    for model, mark in plain.items():
        said = f"{model}, 250 steps of {name_of(mark['solver'])}: {mark['right']:.1%} of {mark['count']} right"
        marks = f"{mark['marks']['right']:.1%} and {mark['marks']['psnr_db']:.1f} dB"
        lines += ["", f"{said}, {mark['psnr_db']:.1f} dB; so the marks are {marks}."]
    return "\n".join(lines)


def _count(row: Row | None, rows: Sequence[Row]) -> str:
    return str(row["evaluations"]) if row is not None else f"more than {max(r['evaluations'] for r in rows)}"


def guided(rows: Sequence[Row]) -> str:
    """One row a method and number of steps, one column a weight."""
    weights = sorted({r["weight"] for r in rows})[1:]
    lines = [f"| steps | method | asks network and guide | {' | '.join(f'weight {w:g}' for w in weights)} |"]
    lines.append(f"|{' --- |' * (3 + len(weights))}")
    for steps, method in dict.fromkeys((r["steps"], r["method"]) for r in rows):
        own = {r["weight"]: r for r in rows if (r["steps"], r["method"]) == (steps, method)}
        asked = next(iter(own.values()))
        cells = [f"{own[w]['right']:.1%}" if w in own else "" for w in weights]
        lines.append(f"| {steps} | {method} | {asked['network']}, {asked['guide']} | {' | '.join(cells)} |")
    nothing = [r for r in rows if r["weight"] == 0]
    lines += ["", *(f"Without a guide, {r['steps']} steps: {r['right']:.1%} of {r['count']} right." for r in nothing)]
    return "\n".join(lines)


def constant_acceleration(rows: Sequence[Row]) -> str:
    """One row a method, two columns a number of evaluations."""
    counts = sorted({r["evaluations"] for r in rows})
    head = "".join(f" {n}: right | PSNR dB |" for n in counts)
    lines = [f"| evaluations |{head}", f"|{' --- |' * (1 + 2 * len(counts))}"]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = {r["evaluations"]: r for r in rows if r["method"] == method}
        cells = [f"{own[n]['right']:.1%} | {own[n]['psnr_db']:.1f}" if n in own else " | " for n in counts]
        model, _, solver = method.partition(" ")
        lines.append(f"| {name_of(solver) + ', ' + model if solver else method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """One column a model: PSNR above, right below, over the number of evaluations; a line a solver."""
    from matplotlib.figure import Figure

    plain, rows = references(rows), measured(rows)
    figure = Figure(figsize=(8 * len(plain), 9), layout="constrained")
    panels = figure.subplots(2, len(plain), squeeze=False, sharex="col")
    texts = list(dict.fromkeys(r["solver"] for r in rows))
    for column, (model, mark) in enumerate(plain.items()):
        for line, (key, label) in enumerate((("psnr_db", "PSNR to the fine solution, dB"), ("right", "right"))):
            panel = panels[line][column]
            for number, text in enumerate(texts):
                own = [r for r in rows if r["model"] == model and r["solver"] == text]
                points = sorted((r["evaluations"], r[key]) for r in own if r[key] is not None)
                if points:
                    style = "o-" if number < 10 else "x--"
                    panel.plot(*zip(*points, strict=True), style, color=f"C{number % 10}", label=name_of(text))
            panel.axhline(mark["marks"][key], color="black", linewidth=0.8, linestyle=":")
            panel.set(ylabel=label, xscale="log")
            panel.grid(alpha=0.3)
        panels[0][column].set_title(f"{model}; dotted: 95 % of 250 steps of {name_of(mark['solver'])}")
        panels[0][column].legend(fontsize=7, ncols=2)
        panels[1][column].set_xlabel("evaluations of the network")
    figure.savefig(path, dpi=110)
