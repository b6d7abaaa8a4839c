"""One row of ``hasten bench``: a work, an implementation, and what was found; and the ratios between rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.tools.bench_implementations import Implementation
from hasten.tools.timing import Times

OK, WRONG, FAILED = "ok", "wrong", "failed"


@dataclass
class Row:
    """Seconds and bytes; ``samples`` are seconds a call, one a round. ``status`` is why ``reason`` is not empty.

    ``peak_bytes`` is resident memory while it ran, ``peak_build_bytes`` the most of any process it needed, building
    included. ``prepare_seconds`` are from an empty process to the end of the first call. ``calls`` are those in one
    sample. ``error`` is the norm of the difference to ``reference`` over that one's norm, the worst of all outputs.
    """

    work: str
    implementation: Implementation
    status: str = OK
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    calls: int = 1
    prepare_seconds: float = 0.0
    peak_bytes: int | None = None
    peak_build_bytes: int | None = None
    device_peak_bytes: int | None = None
    error: float | None = None
    reference: str = ""
    baseline: str = ""
    ratios: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.implementation.name

    @property
    def times(self) -> Times:
        return Times(tuple(self.samples))

    def fail(self, reason: str) -> None:
        """It gives no figures; the others go on."""
        self.status, self.reason, self.samples = FAILED, reason, []

    def grow(self, peak: int | None) -> None:
        """Another process that it needed had this peak."""
        self.peak_build_bytes = max(filter(None, (self.peak_build_bytes, peak)), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        seconds = ratio = None
        if self.samples:
            times = self.times
            spread = (times.quantile(0.8) - times.quantile(0.2)) / times.median
            seconds = {**times.as_dict(), "spread": spread, "samples": list(self.samples)}
        if self.ratios:
            ratio = {"baseline": self.baseline, **Times(self.ratios).as_dict()}
        return {
            "work": self.work,
            "implementation": self.name,
            "status": self.status,
            "reason": self.reason,
            "seconds": seconds,
            "calls_per_sample": self.calls,
            "times_as_fast": ratio,
            "error": self.error,
            "reference": self.reference,
            "peak_bytes": self.peak_bytes,
            "peak_bytes_with_build": self.peak_build_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "prepare_seconds": self.prepare_seconds,
        }


def compare(rows: Sequence[Row], baseline: str | None) -> None:
    """Ratios within each round, against the baseline named or the fastest that is not ours and not wrong.

    Each device has its own baseline, and where only ours ran, the first of them is it.
    """
    for device in {row.implementation.device for row in rows}:
        timed = [r for r in rows if r.samples and r.implementation.device == device]
        against = next((r for r in timed if r.name == baseline), None)
        if baseline is None:
            right = [r for r in timed if r.status == OK]
            others = [r for r in right if not r.implementation.ours]
            against = min(others, key=lambda r: r.times.median) if others else next(iter(right), None)
        if against is None:
            continue
        for row in timed:
            row.baseline = against.name
            row.ratios = tuple(b / own for b, own in zip(against.samples, row.samples, strict=True))
