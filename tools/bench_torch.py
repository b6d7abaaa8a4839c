"""Implementations of ``hasten bench`` that run inside torch; each function runs in a worker of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.tools.bench_subject import Subject

Call = Callable[[], Any]


def eager(subject: Subject, folder: Path, *, channels_last: bool = False) -> Call:
    """The module as it is."""
    module, inputs = _ready(subject, channels_last)
    return _call(module, inputs)


def compiled(
    subject: Subject,
    folder: Path,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    freezing: bool = False,
    channels_last: bool = False,
) -> Call:
    """``torch.compile`` with static sizes; the first call compiles."""
    import torch
    import torch._inductor.config

    module, inputs = _ready(subject, channels_last)
    if freezing:
        # Dynamo asks Inductor's global configuration whether weights become constants of the graph: as an option of
        # torch.compile alone, freezing reaches a graph that has its weights among its inputs, and freezes nothing.
        torch._inductor.config.freezing = True
    return _call(torch.compile(module, backend=backend, mode=mode, dynamic=False), inputs)


def _ready(subject: Subject, channels_last: bool) -> tuple[Any, dict[str, Any]]:
    import torch

    module, inputs = subject.module(), subject.inputs()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        inputs = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in inputs.items()}
    return module, inputs


def _call(module: Any, inputs: dict[str, Any]) -> Call:
    import torch

    def call() -> Any:
        with torch.no_grad():
            return module(**inputs)

    return call
