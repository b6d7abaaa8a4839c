"""The JSON lines of ``hasten bench``, and the tables of a Markdown file that are made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, UsageError
from hasten.tools.bench_row import FAILED, WRONG
from hasten.tools.files import replace_text

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
_KEYS = ("work", "implementation", "status", "threads", "device", "dtype", "malloc", "date", "versions")
Line = dict[str, Any]


def append(path: Path, lines: Iterable[Line]) -> None:
    """Add one line for each; a run that is interrupted later keeps those it has written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    except OSError as error:
        raise HastenError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> list[Line]:
    """All lines, in order; `UsageError` with the line's number for one that is none of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = []
    for number, words in enumerate(text.splitlines(), 1):
        if not words.strip():
            continue
        try:
            line = json.loads(words)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: it is not JSON ({error.msg})") from error
        missing = [key for key in _KEYS if key not in line] if isinstance(line, dict) else ["an object"]
        if missing:
            raise UsageError(
                f"{path}, line {number}: there is no {missing[0]}; `hasten bench --jsonl` writes such lines"
            )
        lines.append(line)
    return lines


def latest(lines: Iterable[Line]) -> list[Line]:
    """Of every work, implementation, number of threads, device, dtype and allocator, the line that was written last."""
    kept: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = tuple(line[k] for k in ("device", "threads", "dtype", "malloc", "work", "implementation"))
        kept[key] = line
    return list(kept.values())


def markdown(lines: Sequence[Line]) -> str:
    """For each device, number of threads, dtype and allocator: conditions, and tables of times, ratios and memory."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in latest(lines):
        groups.setdefault(tuple(line[k] for k in ("device", "threads", "dtype", "malloc")), []).append(line)
    return "\n\n".join(_group(group) for group in groups.values())


def write_markdown(text: str, path: Path) -> None:
    """Replace what stands between the marks of ``path``; `UsageError` where it has none."""
    try:
        before, begun, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise UsageError(f"{path} has no line {BEGIN} with {END} after it; write both where the tables shall stand")
    replace_text(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _group(lines: Sequence[Line]) -> str:
    first = lines[0]
    dates = sorted({line["date"].partition("T")[0] for line in lines})
    packages = sorted({f"{name} {number}" for line in lines for name, number in line["versions"].items()})
    threads = f"{first['threads']} thread{'s' if first['threads'] != 1 else ''}"
    variables = sorted({f", {k}={v}" for line in lines for k, v in line.get("environment", {}).items()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = (
        f"{first['device']}, {threads}, {first['dtype']}, {malloc_words(first['malloc'])}{''.join(variables)}, {when}; "
    )
    parts = [
        where + ", ".join(packages) + ".",
        "Milliseconds a call, median; the fastest that is right in bold:",
        _matrix(lines, _time),
        "Times as fast as the baseline, median of the rounds' ratios (20th to 80th percentile):",
        _matrix(lines, _ratio),
        "MiB resident at most while it runs, in a process of its own (of any process it needed, building included):",
        _matrix(lines, _memory),
    ]
    notes = [f"- {x['implementation']} of {x['work']}: {x['reason']}" for x in lines if x["status"] in (FAILED, WRONG)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def malloc_words(malloc: str) -> str:
    """How freed memory was treated."""
    return "allocator keeps its pages" if malloc == "keep" else "allocator as the system has it"


def _matrix(lines: Sequence[Line], cell: Callable[[Line, Sequence[Line]], str]) -> str:
    works = list(dict.fromkeys(line["work"] for line in lines))
    columns = list(dict.fromkeys(line["implementation"] for line in lines))
    rows = [["work", *columns], ["---"] * (len(columns) + 1)]
    for work in works:
        of_work = [line for line in lines if line["work"] == work]
        by_name = {line["implementation"]: line for line in of_work}
        rows.append([work, *(cell(by_name[c], of_work) if c in by_name else "" for c in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _time(line: Line, of_work: Sequence[Line]) -> str:
    if line["status"] == FAILED:
        return "failed"
    right = [x["seconds"]["median"] for x in of_work if x["status"] not in (FAILED, WRONG)]
    median = line["seconds"]["median"]
    text = milliseconds(median)
    if line["status"] == WRONG:
        return f"{text} (wrong)"
    return f"**{text}**" if median == min(right) else text


def _ratio(line: Line, of_work: Sequence[Line]) -> str:
    ratio = line.get("times_as_fast")
    if line["status"] == FAILED or not ratio:
        return ""
    if ratio["baseline"] == line["implementation"]:
        return "baseline"
    text = f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    # Rows of different runs may have had different baselines: each says its own then.
    several = {(x.get("times_as_fast") or {}).get("baseline") for x in of_work} - {None}
    return text if len(several) == 1 else f"{text} {ratio['baseline']}"


def _memory(line: Line, of_work: Sequence[Line]) -> str:
    running, everything = line["peak_bytes"], line["peak_bytes_with_build"]
    if line["status"] == FAILED or running is None:
        return ""
    return f"{running / 2**20:.0f} ({everything / 2**20:.0f})" if everything else f"{running / 2**20:.0f}"


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the point.

    >>> milliseconds(0.0123456), milliseconds(1.23456), milliseconds(0.000123456)
    ('12.3', '1235', '0.123')
    """
    value = seconds * 1e3
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"
