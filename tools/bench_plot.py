"""The plot of ``hasten bench``: one panel a work, one bar an implementation, as long as a call takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.errors import need
from hasten.tools.bench_row import FAILED, WRONG
from hasten.tools.files import replace

SUFFIXES = (".png", ".svg", ".pdf")
_COLUMNS = 3
_CONDITIONS = ("device", "threads", "dtype", "malloc")
_OURS, _OTHERS, _WRONG = "#c2410c", "#94a3b8", "#e5e7eb"


def require() -> None:
    """Raise `MissingPackageError` where there is no matplotlib; before anything is timed, not after."""
    need("matplotlib", extra="bench")


def write(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw rows as `hasten.tools.bench_lines` has them; the whiskers are the 20th and 80th percentile."""
    need("matplotlib", extra="bench")
    from matplotlib.figure import Figure

    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["status"] != FAILED:
            groups.setdefault(tuple(str(line[k]) for k in ("work", *_CONDITIONS)), []).append(line)
    # what is the same in all panels stands in the title, once
    differing = [i for i in range(1, len(_CONDITIONS) + 1) if len({key[i] for key in groups}) > 1]
    columns = min(_COLUMNS, max(1, len(groups)))
    count = max(1, -(-len(groups) // columns))
    most = max(map(len, groups.values()), default=1)
    figure = Figure(figsize=(5.2 * columns, (0.9 + 0.27 * most) * count + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(count, columns, squeeze=False).flatten()
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel, (key, group) in zip(panels, groups.items(), strict=False):
        more = [f"{_CONDITIONS[i - 1]} {key[i]}" for i in differing]
        _panel(panel, ", ".join([key[0], *more]), group)
    replace(path, lambda partial: figure.savefig(partial, dpi=150))


def _panel(panel: Any, title: str, lines: Sequence[dict[str, Any]]) -> None:
    names = [line["implementation"] + (" (wrong)" if line["status"] == WRONG else "") for line in lines]
    medians = [line["seconds"]["median"] * 1e3 for line in lines]
    whiskers = [
        [m - line["seconds"]["p20"] * 1e3 for m, line in zip(medians, lines, strict=True)],
        [line["seconds"]["p80"] * 1e3 - m for m, line in zip(medians, lines, strict=True)],
    ]
    colours = [
        _WRONG if line["status"] == WRONG else _OURS if "hasten" in line["implementation"].split("-") else _OTHERS
        for line in lines
    ]
    places = range(len(lines))
    panel.barh(places, medians, xerr=whiskers, color=colours, error_kw={"linewidth": 0.8, "capsize": 2})
    panel.set_yticks(places, names, fontsize=7)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=8, loc="left")
    panel.set_xlabel("ms a call", fontsize=7)
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    for place, median in zip(places, medians, strict=True):
        panel.annotate(f" {median:.3g}", (median, place), xytext=(4, -7), textcoords="offset points", fontsize=6)
