"""Which implementation a layer gets: what is asked, what is answered, and what bounds the answer.

A pass describes each site as a `Layer`; a chooser answers with a `Choice`, from a model of the machine (roofline) or
from a measurement (`hasten.backends.tuning`). Nothing here knows how an implementation works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DIRECT = "direct"
"""The library's own: what the graph had before."""
DEFAULT_MAX_ERROR = 1.2e-6
"""Relative rms error of a layer. Direct float32 convolutions are 2e-7 to 3e-7 off, F(4x4) 6e-7 to 1e-6 in our kernels
and 1e-6 to 1.1e-6 in ONNX operators; F(6x6), at 3e-6, must be asked for with a larger bound."""


@dataclass(frozen=True)
class Layer:
    """One convolution. ``height`` and ``width`` are the input map's; ``op`` is ``conv2d`` or ``upsample_conv2d``.

    ``conv2d`` is 3x3 with stride 1; ``upsample_conv2d`` is nearest 2x, then such a convolution.
    """

    op: str
    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def __str__(self) -> str:
        return (
            f"{self.op} {self.channels}-{self.outputs}@{self.height}x{self.width}, batch {self.batch}, {self.dtype}, "
            f"{self.device}, {self.threads} thread{'s' if self.threads != 1 else ''}"
        )


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer. ``error``: expected relative rms error; bytes are beyond those of ``direct``."""

    name: str
    predicted_seconds: float
    weight_bytes: int = 0
    workspace_bytes: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The candidate taken for a layer, and why. ``measured_seconds`` of every candidate that was timed, by name."""

    layer: Layer
    candidate: Candidate
    reason: str
    direct_seconds: float
    measured_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def saved_seconds(self) -> float:
        """What the choice is expected to save, by measurement where there is one."""
        if self.measured_seconds:
            return self.measured_seconds[DIRECT] - self.measured_seconds[self.name]
        return self.direct_seconds - self.candidate.predicted_seconds

    def as_dict(self) -> dict[str, Any]:
        """For the report: sizes in bytes, times in seconds."""
        return {
            "layer": str(self.layer),
            "implementation": self.name,
            "reason": self.reason,
            "predicted_seconds": self.candidate.predicted_seconds,
            "predicted_direct_seconds": self.direct_seconds,
            "measured_seconds": dict(self.measured_seconds) or None,
            "weight_bytes": self.candidate.weight_bytes,
            "workspace_bytes": self.candidate.workspace_bytes,
            "expected_error": self.candidate.error,
        }


@dataclass(frozen=True)
class Limits:
    """What bounds every choice.

    ``memory_budget``: bytes that transformed weights and the largest workspace may take together; ``max_error``:
    relative rms error of a layer; ``strict_nan``: only implementations that give NaN and infinity exactly where the
    direct computation does; ``half``: whether float16 layers may take an implementation that rounds more.
    """

    memory_budget: int | None = None
    max_error: float | None = DEFAULT_MAX_ERROR
    strict_nan: bool = False
    half: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Chooser = Callable[[Layer, Sequence[Candidate]], Choice]
"""Chooses among candidates, of which the first is ``direct``."""


def fastest_predicted(layer: Layer, candidates: Sequence[Candidate]) -> Choice:
    """The candidate that the roofline model calls fastest: the answer where nothing is measured."""
    best = min(candidates, key=lambda c: c.predicted_seconds)
    return Choice(layer, best, "fastest by the roofline model", candidates[0].predicted_seconds)


def within_budget(choices: Sequence[Choice], budget: int | None) -> list[Choice]:
    """Give memory to the choices that save most time per byte; the others fall back to ``direct``.

    Weights add up over layers; a workspace is used by one layer after another, so the largest counts.
    """
    if budget is None:
        return list(choices)
    kept: dict[int, Choice] = {}
    weights = workspace = 0
    order = sorted(
        range(len(choices)),
        key=lambda i: choices[i].saved_seconds / max(1, choices[i].candidate.weight_bytes),
        reverse=True,
    )
    for index in order:
        choice = choices[index]
        wanted = weights + choice.candidate.weight_bytes, max(workspace, choice.candidate.workspace_bytes)
        if choice.name == DIRECT or sum(wanted) <= budget:
            weights, workspace = wanted
            kept[index] = choice
            continue
        needed = f"{choice.candidate.weight_bytes} bytes of weights"
        if wanted[0] <= budget:  # the weights alone would fit
            needed += f" and a workspace of {choice.candidate.workspace_bytes} bytes"
        over = f"{choice.name} needs {needed}, which the memory budget of {budget}"
        direct = Candidate(DIRECT, choice.direct_seconds)
        kept[index] = Choice(
            choice.layer, direct, f"{over} does not leave", choice.direct_seconds, choice.measured_seconds
        )
    return [kept[index] for index in range(len(choices))]
