"""What may happen to the predicted x0 inside the loop: clipping and thresholding.

These are not linear, so a table's coefficients cannot hold them: a table names its hook (`SolverTable.hook`), and what
runs it applies that. Arrays stay in their own namespace. In an engine they are `passes.fx.clean_hook`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import UsageError

Hook = Callable[[Any], Any]
"""x0 -> x0, an array of the latents' shape (B, ...)."""


@dataclass(frozen=True)
class Clip:
    """Keep x0 within ``-limit .. limit`` (diffusers: ``clip_sample``, ``clip_sample_range``)."""

    limit: float = 1.0

    kind = "clip"

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise UsageError(f"clip: the limit is {self.limit:g}; it must be positive")

    def __call__(self, x0: Any) -> Any:
        """x0 (B, ...), clipped."""
        return x0.clip(-self.limit, self.limit)


@dataclass(frozen=True)
class Threshold:
    """Keep each sample within its own quantile, and scale it to 1 (Saharia et al., 2205.11487, dynamic thresholding).

    ``s`` is the ``ratio`` quantile of a sample's absolute values, at least 1 and at most ``largest``; x0 is kept within
    ``-s .. s`` and divided by s (diffusers: ``dynamic_thresholding_ratio``, ``sample_max_value``).
    """

    ratio: float = 0.995
    largest: float = 1.0

    kind = "threshold"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise UsageError(f"threshold: the ratio is {self.ratio:g}; a quantile goes from 0 to 1")
        if not self.largest >= 1 or math.isnan(self.largest):
            raise UsageError(f"threshold: the largest value is {self.largest:g}; it is at least 1")

    def __call__(self, x0: Any) -> Any:
        """x0 (B, ...), each of its B samples within -1 .. 1."""
        size = abs(x0).reshape(len(x0), -1)
        # torch.Tensor has quantile as a method; numpy as a function.
        s = size.quantile(self.ratio, 1) if hasattr(size, "quantile") else np.quantile(size, self.ratio, axis=1)
        s = s.clip(1, self.largest).reshape(-1, *(1,) * (x0.ndim - 1))
        # clip takes two tensors or two arrays alike
        return x0.clip(-s, s) / s

    def top(self, size: int) -> int:
        """How many of the largest of ``size`` values give this quantile and every higher one."""
        rank = int(np.float32(self.ratio) * np.float32(size - 1))  # rounded as a loop in float32 rounds it
        return size - min(rank, size - 1)


KINDS = ("none", Clip.kind, Threshold.kind)
"""What a compiled loop can be built for: nothing, or one of the two."""


def asked(clip: float | None, threshold: float | None, largest: float | None) -> Clip | Threshold | None:
    """The hook that a solver's options ask for; an infinite ``clip`` is none. `UsageError` for two hooks at once."""
    if clip is not None and threshold is not None:
        raise UsageError("clip and threshold are two ways to keep x0 in its range; take one")
    if largest is not None and threshold is None:
        raise UsageError("largest bounds the threshold, and there is none; give threshold, such as threshold=0.995")
    if threshold is not None:
        return Threshold(threshold, 1.0 if largest is None else largest)
    return None if clip is None or clip == math.inf else Clip(clip)
