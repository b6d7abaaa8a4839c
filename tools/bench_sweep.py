"""What the sweeps of ``hasten bench`` share: trained models, pictures in turns, how right they are, and a figure."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hasten.errors import UsageError, nearest
from hasten.tools.files import replace as replace_file
from hasten.tools.timing import Times

if TYPE_CHECKING:
    import torch

    from hasten.models.adapter import Adapter

GUIDANCE = 2.0
Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


def adapters(args: argparse.Namespace, flag: str) -> list[Adapter]:
    """The bundled models among ``args.sources``, with a guided batch of ``args.count`` pictures."""
    from hasten.models.registry import BUNDLED, get

    for name in args.sources:
        if name not in BUNDLED:
            raise UsageError(
                f"{flag} measures quality on trained models, and {name!r} is none; there are {', '.join(BUNDLED)}."
                f"{nearest(name, BUNDLED)}"
            )
    if not args.sources:
        raise UsageError(f"{flag}: name a bundled model, such as scenes-dit")
    return [replace(get(name), batch=2 * args.count) for name in args.sources]


def labels_of(adapter: Adapter, count: int) -> list[int]:
    """``count`` classes of a bundled model, spread over all."""
    from hasten.models.scenes.adapters import specification
    from hasten.models.scenes.subject import subject

    classes = len(subject(specification(adapter.name)).classes)
    return [(5 * i) % classes for i in range(count)]


def right(pictures: torch.Tensor, labels: Sequence[int]) -> float:
    """The part of the pictures that the independent classifier names as asked, of clips their motion too."""
    import torch

    from hasten.models.scenes.evaluate import marks

    found = marks(pictures, torch.tensor(labels))
    return float(found["all"] if "all" in found else found["both"])


def thresholds_of(policy: str, given: Sequence[float] | None) -> Sequence[float | None]:
    """The thresholds to measure a step cache at: ``given``, or its own (None) where it has none or none is given."""
    from hasten.passes.steps.catalog import canonical

    return given if given and "threshold=" in canonical(policy) else [None]


def rounds(
    runs: Mapping[Key, Callable[[], Made]], count: int, tell: Callable[[str, float], None]
) -> tuple[dict[Key, Made], dict[Key, Times]]:
    """Do every run ``count`` times, in turns, after one round that is not timed: what each made last, and its times."""
    made: dict[Key, Made] = {}
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for turn in range(count + 1):
        tell(f"round {turn} of {count}", turn / (count + 1))
        for key, run in runs.items():
            began = time.perf_counter()
            made[key] = run()
            if turn:
                seconds[key].append(time.perf_counter() - began)
    return made, {key: Times(tuple(found)) for key, found in seconds.items()}


class Panel(NamedTuple):
    """A panel of a figure: ``lines`` are points (x, y) by label."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels side by side; the suffix of ``path`` is the format, and lines of one label have one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in panel.lines.items():
            # one colour for a label in all panels
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label, color=f"C{labels.index(label)}")
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
        if panel.lines:
            axes.legend(fontsize=7)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=150))
