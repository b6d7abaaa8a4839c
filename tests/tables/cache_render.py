"""The table and the plot of what ``caches.py`` measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- caches -->", "<!-- /caches -->"
LEVELS = (30, 35, 40)
"""Decibels at which the fastest of each library are compared."""
WITHIN = 0.01
"""What accuracy may lose to that of computing every step."""
Row = dict[str, Any]


def render(jsonl: Path, into: Path | None, plot: Path | None) -> int:
    """Write both; 1 where nothing was measured."""
    rows = merged(json.loads(line) for line in jsonl.read_text(encoding="utf-8").splitlines())
    whole = [r for r in rows if "gain" in r and "psnr_db" in r]
    if not whole:
        print(f"{jsonl}: no setting has both its quality and its time", file=sys.stderr)
        return 1
    text = "\n\n".join(_model(rows, name) for name in dict.fromkeys(r["model"] for r in rows)) + "\n"
    print(text)
    if into is not None:
        before, _, rest = into.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        into.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    if plot is not None:
        draw(whole, plot)
    return 0


def merged(lines: Iterable[Row]) -> list[Row]:
    """One row a setting and form: quality does not depend on the form, and is that of most pictures."""
    quality: dict[tuple[str, ...], Row] = {}
    times: dict[tuple[str, ...], Row] = {}
    for line in lines:
        key = tuple(line[k] for k in ("model", "library", "method", "setting"))
        if line["kind"] == "time":
            times[(*key, line["form"])] = line
        elif line["count"] >= quality.get(key, {"count": 0})["count"]:
            quality[key] = line
    found = []
    for key in dict.fromkeys((*quality, *(k[:-1] for k in times))):
        forms = [k[-1] for k in times if k[:-1] == key] or [quality[key]["form"]]
        found += [{**times.get((*key, form), {}), **quality.get(key, {}), "form": form} for form in forms]
    return found


def _model(rows: Sequence[Row], name: str) -> str:
    own = [r for r in rows if r["model"] == name]
    done = [r for r in own if "gain" in r and "psnr_db" in r]
    first = next((r for r in own if "uncached_accuracy" in r), None)
    right = "" if first is None else f" Every step computed, the classifier names {first['uncached_accuracy']:.1%}."
    batch = 8 if first is None else first.get("batch", 8)
    lines = [f"{name}, 50 steps, guidance 2, runs of {batch}.{right}", ""]
    lines += [*_levels(done), "", *_best(done), ""]
    lines += [
        "| cache | setting | form | computed | PSNR dB | SSIM | right | of | times as fast | s a run | uncached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += map(_line, own)
    return "\n".join(lines)


def _line(row: Row) -> str:
    name = f"{row['library']} {row['method']}" if row["library"] != "hasten" else row["method"]
    start = f"| {name} | {row['setting']} | {row['form']} |"
    if "error" in row:
        return f"{start} {row['error'].replace('|', ' ')} | | | | | | | |"
    psnr = row.get("psnr_db", 0.0)
    cells = [
        f"{row['computed']:.3g}" if row.get("computed") is not None else "",
        "" if psnr == 0.0 else "identical" if psnr is None else f"{psnr:.1f}",
        f"{row['ssim']:.3f}" if "ssim" in row else "",
        f"{row['accuracy']:.1%}" if "accuracy" in row else "",
        str(row.get("count", "")),
        f"{row['gain']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})" if "gain" in row else "",
        f"{row['seconds']:.3f}" if "seconds" in row else "",
        f"{row['uncached_seconds']:.3f}" if "uncached_seconds" in row else "",
    ]
    return f"{start} {' | '.join(cells)} |"


def _fastest(rows: Sequence[Row], fits: Callable[[Row], bool], key: str = "gain") -> Row | None:
    best = max if key == "gain" else min
    return best((r for r in rows if fits(r)), key=lambda r: r[key], default=None)


def _levels(rows: Sequence[Row]) -> list[str]:
    """At each level the fastest setting of ours and of the others, by their own gain, and by the clock."""
    lines = [
        "| PSNR at least | ours, times as fast | best of the others | ours / theirs | ours, s | theirs, s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours, others = ([r for r in rows if (r["library"] == "hasten") == own] for own in (True, False))
    for level in LEVELS:

        def fits(row: Row, level: int = level) -> bool:
            return row["psnr_db"] is None or row["psnr_db"] >= level

        a, b = _fastest(ours, fits), _fastest(others, fits)
        c, d = _fastest(ours, fits, "seconds"), _fastest(others, fits, "seconds")
        if a is None or c is None:
            lines.append(f"| {level} dB | none | | | | | |")
            continue
        cells = [f"{level} dB", f"{a['gain']:.2f} ({a['method']}, {a['setting']})"]
        if b is None or d is None:
            cells += ["none", "", f"{c['seconds']:.3f}", "", ""]
        else:
            cells += [f"{b['gain']:.2f} ({b['library']} {b['method']}, {b['setting']}, {b['form']})"]
            cells += [f"{a['gain'] / b['gain']:.2f}", f"{c['seconds']:.3f}", f"{d['seconds']:.3f} ({d['form']})"]
            cells += [f"{d['seconds'] / c['seconds']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _best(rows: Sequence[Row]) -> list[str]:
    """The fastest setting of ours that keeps the accuracy."""
    ours = [r for r in rows if r["library"] == "hasten"]
    found = _fastest(ours, lambda r: r["accuracy"] >= r["uncached_accuracy"] - WITHIN)
    if found is None:
        return ["No setting of ours that was timed keeps the accuracy within one point."]
    psnr = "identical" if found["psnr_db"] is None else f"{found['psnr_db']:.1f} dB"
    return [
        f"Fastest within one point of accuracy: {found['gain']:.2f} times, {found['method']}, {found['setting']}: "
        f"{psnr}, {found['accuracy']:.1%} of {found['count']} right, {found['uncached_accuracy']:.1%} uncached."
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """One panel a model, one line a library's method and form: gain over its own uncached run to the right, PSNR up."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure = Figure(figsize=(8 * len(models), 6.5), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        lines: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            if row["model"] == model and row["psnr_db"] is not None:
                method = row["method"]
                if method == "searched mask":
                    method += f", {row['setting'].split(', ')[-1]}"
                lines.setdefault((row["library"], method, row["form"]), []).append(row)
        for number, ((library, method, form), points) in enumerate(lines.items()):
            points.sort(key=lambda r: r["gain"])
            panel.plot(
                [r["gain"] for r in points],
                [r["psnr_db"] for r in points],
                "o-" if library == "hasten" else "x:",
                color=f"C{number % 10}",
                linewidth=2.5 if method.startswith("searched") else 1.2,
                label=method if library == "hasten" else f"{library} {method}, {form}",
            )
        panel.set(title=model, xlabel="times as fast as its own run with every step computed", ylabel="PSNR, dB")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=130)
