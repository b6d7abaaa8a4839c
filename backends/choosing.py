"""The options of measured choice, the same for `optimize`, `build` and ``torch.compile``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.passes.choice import DEFAULT_MAX_ERROR, Chooser, Limits

MODES = ("off", "cached", "on")
"""``off``: the roofline model chooses. ``cached``: what was measured, else the roofline model. ``on``: what is missing
is measured and kept."""


@dataclass(frozen=True)
class Choosing:
    """How implementations are chosen.

    ``tune`` is one of `MODES`. ``memory_budget``: bytes for transformed weights and the largest workspace.
    ``max_error``: relative rms error against float64 that the whole model may have, and each layer is expected to
    have. ``strict_nan``: no implementation that spreads NaN and infinity further. ``half``: such implementations in
    float16 too.
    """

    tune: str = "cached"
    memory_budget: int | None = None
    max_error: float | None = None
    strict_nan: bool = False
    half: bool = False

    def __post_init__(self) -> None:
        if self.tune not in MODES:
            raise UsageError(f"tune: {self.tune!r} is none of {', '.join(MODES)}.{nearest(self.tune, MODES)}")
        budget = self.memory_budget
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
            raise UsageError(f"memory_budget: {budget!r} is not a number of bytes from 0 up")
        error = self.max_error
        if error is not None and not (isinstance(error, (int, float)) and math.isfinite(error) and error > 0):
            raise UsageError(f"max_error: {error!r} is not a relative error above 0, such as 1e-5")

    def limits(self, layer_error: float | None = None) -> Limits:
        """The limits on a layer; ``layer_error`` is a tighter bound than ``max_error``."""
        bound = layer_error if layer_error is not None else self.max_error
        return Limits(self.memory_budget, DEFAULT_MAX_ERROR if bound is None else bound, self.strict_nan, self.half)

    def chooser(self) -> Chooser:
        """The chooser of this mode."""
        from hasten.backends.tuning import TunedChooser
        from hasten.backends.tuning_store import Store

        return TunedChooser(Store(), self.tune)


def from_options(options: Mapping[str, Any]) -> Choosing:
    """The options that are there, of `Choosing`'s."""
    return Choosing(**{k: options[k] for k in Choosing.__dataclass_fields__ if k in options})
