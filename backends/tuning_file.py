"""The file of measured times: what is in it, how it is read and written. JSON, with a schema number.

Nothing in it is trusted: a file in which anything is out of place counts as damaged as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from hasten.backends.tuning_machine import Machine
from hasten.passes.choice import Layer

SCHEMA = 1
"""A file with another number is not read. A new field of `Layer` needs a new number."""
LAYOUT = "channels-last"
"""Memory format of every input that is timed."""
BUSY = 100.0
"""Interruptions a second. With two threads on a two-core machine that had other work to do there were 270, and a layer
of 70 µs took 8 ms: threads wait for one that is not running. With one thread there were 60 to 80, and medians held."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of an implementation: median, 20th and 80th percentile over ``rounds``.

    ``way`` names the form that was fastest, where an implementation has several.
    """

    seconds: float
    p20: float
    p80: float
    rounds: int
    way: str = ""


@dataclass(frozen=True)
class Measurement:
    """One run: every implementation timed side by side, those that ``failed`` with the reason, and when it ended.

    Two runs are never mixed: the machine may have been busier in one of them. ``interruptions``: how often a second
    the system took a processor away from the timed threads.
    """

    timings: Mapping[str, Timing]
    failed: Mapping[str, str]
    date: str
    interruptions: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other work disturbed the run so much that its times say little."""
        return self.interruptions > BUSY

    @property
    def names(self) -> frozenset[str]:
        """Everything that is known, failures included."""
        return frozenset(self.timings) | frozenset(self.failed)


@dataclass(frozen=True)
class Key:
    """What a measurement holds for."""

    machine: Machine
    layer: Layer


Entries = dict[Key, Measurement]


def read(path: Path) -> tuple[Entries, str]:
    """The entries, and what is wrong with the file; a file that is not there is empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return ({}, "") if isinstance(error, NotADirectoryError) else ({}, reason(error))
    except (ValueError, RecursionError) as error:
        return {}, f"it is not JSON ({reason(error)})"
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or isinstance(schema, bool):
        return {}, f"its schema is {schema!r}, and this version of hasten reads {SCHEMA}"
    try:
        return dict(map(_entry, content["entries"])), ""
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return {}, f"an entry is damaged ({type(error).__name__}: {reason(error)})"


def _entry(content: Any) -> tuple[Key, Measurement]:
    layer = dict(content["layer"])
    if layer.pop("layout") != LAYOUT:
        raise ValueError(f"layout is not {LAYOUT}")
    kinds = {f.name: str if f.type == "str" else int for f in fields(Layer)}
    if layer.keys() != kinds.keys():
        raise ValueError(f"the layer has {', '.join(layer)}")
    for name, value in layer.items():
        if type(value) is not kinds[name]:
            raise TypeError(f"{name} is {value!r}")
    timings = {str(name): _timing(row) for name, row in content["timings"].items()}
    failed = {str(name): str(reason) for name, reason in content["failed"].items()}
    here = Machine(str(content["machine"]), str(content["versions"]))
    run = Measurement(timings, failed, str(content["date"]), float(content["interruptions"]))
    return Key(here, Layer(**layer)), run


def _timing(content: Any) -> Timing:
    timing = Timing(
        float(content["seconds"]),
        float(content["p20"]),
        float(content["p80"]),
        int(content["rounds"]),
        str(content["way"]),
    )
    if not 0 < timing.p20 <= timing.seconds <= timing.p80 < float("inf"):
        raise ValueError(f"{timing.p20}, {timing.seconds}, {timing.p80} are no percentiles of a time")
    return timing


def text(entries: Entries) -> str:
    listed = [
        {
            "machine": key.machine.name,
            "versions": key.machine.versions,
            "layer": {**asdict(key.layer), "layout": LAYOUT},
            "timings": {name: asdict(timing) for name, timing in m.timings.items()},
            "failed": dict(m.failed),
            "date": m.date,
            "interruptions": m.interruptions,
        }
        for key, m in entries.items()
    ]
    return json.dumps({"schema": SCHEMA, "entries": listed}, indent=1, allow_nan=False) + "\n"


def now() -> str:
    """The date of a measurement: local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
