"""The first and the last calls of a run, which a policy computes whatever it measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.passes.steps.policy import COMPUTE, DECIDE, Array, Control, as_float32


@dataclass(frozen=True)
class Retained:
    """``first`` and ``last`` are numbers of calls; ``share`` of the run's calls are computed at its beginning as well.

    Rules about ``last`` and ``share`` hold only where the number of calls is known.
    """

    first: int = 1
    last: int = 0
    share: float = 0.0

    def wanted(self, control: Control) -> Array:
        """Whether this call is one of them: a 0-d bool."""
        wanted = control.step < self.first
        if self.last:
            wanted = wanted | ((control.steps > 0) & (control.step >= control.steps - self.last))
        if self.share:
            wanted = wanted | (as_float32(control.step) < as_float32(control.steps) * self.share)
        return wanted

    def calls(self, steps: int) -> npt.NDArray[np.int64]:
        """``Control.force`` of each call of a run of ``steps`` calls: `COMPUTE` or `DECIDE`."""
        wanted = [step == 0 or self.wanted(control_at(step, steps)) for step in range(steps)]
        return np.where(np.array(wanted, bool), COMPUTE, DECIDE).astype(np.int64)


def control_at(step: int, steps: int, *, force: int = DECIDE, threshold: float = 0.0, limit: int = -1) -> Control:
    """One call's controls as numpy arrays."""
    numbers: dict[str, Any] = {"step": step, "steps": steps, "force": force, "limit": limit}
    return Control(
        **{name: np.asarray(value, np.int64) for name, value in numbers.items()},
        threshold=np.asarray(threshold, np.float32),
    )
