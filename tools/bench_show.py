"""What ``hasten bench`` shows: the conditions, a table for each work, and what is not in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.tools.bench_lines import Line, malloc_words, milliseconds
from hasten.tools.bench_row import FAILED, WRONG
from hasten.tools.console import table

_COLUMNS = (
    "implementation",
    ">median ms",
    ">p20",
    ">p80",
    ">times as fast",
    ">peak MiB",
    ">with build",
    ">prepared in",
)


def heading(common: Line, device: str) -> str:
    """Everything that holds for all rows."""
    cpus, threads = common["cpus"], common["threads"]
    where = "not pinned"
    if cpus is not None:
        where = f"on processor{'s' if len(cpus) > 1 else ''} {', '.join(map(str, cpus))}"
    packages = ", ".join(f"{name} {number}" for name, number in common["versions"].items())
    words = f"{threads} thread{'s' if threads != 1 else ''} {where}, {common['dtype']}"
    return f"{device}, {words}, {malloc_words(common['malloc'])}; {packages}"


def work_parts(lines: Sequence[Line]) -> list[Any]:
    """The table of one work, and a line for each implementation that failed or is wrong."""
    shown = table(*_COLUMNS, ">error", title=lines[0]["work"])
    for line in lines:
        shown.add_row(*_cells(line))
    return ["", shown, *(f"{x['implementation']}: {x['reason']}" for x in lines if x["reason"])]


def title(lines: Sequence[Line]) -> str:
    """Above a plot: the conditions of the first line."""
    first = lines[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] != 1 else ''}"
    return f"{first['device']}, {threads}, {first['dtype']}, {first['date'].partition('T')[0]}"


def _cells(line: Line) -> list[str]:
    if line["status"] == FAILED:
        return [line["implementation"], "failed"]
    times = [milliseconds(line["seconds"][k]) for k in ("median", "p20", "p80")]
    memory = ["" if line[k] is None else f"{line[k] / 2**20:.0f}" for k in ("peak_bytes", "peak_bytes_with_build")]
    prepared = f"{line['prepare_seconds']:.1f} s"
    return [line["implementation"], *times, _ratio(line), *memory, prepared, _error(line)]


def _ratio(line: Line) -> str:
    ratio = line["times_as_fast"]
    if ratio is None:
        return ""
    if ratio["baseline"] == line["implementation"]:
        return "baseline"
    return f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _error(line: Line) -> str:
    if line["reference"] == line["implementation"]:
        return "reference"
    if line["status"] == WRONG:
        return "wrong"
    return "not compared" if line["error"] is None else f"{line['error']:.1e}"
