"""How far one implementation's outputs are from the reference's; from files, so that no process holds both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def relative_error(wanted: Sequence[str], found: Sequence[str]) -> tuple[float | None, str]:
    """The largest norm of an error over the norm of what was wanted; or None, and why there is no such number."""
    if len(wanted) != len(found):
        return None, f"it gives {len(found)} outputs instead of {len(wanted)}"
    worst = 0.0
    for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
        x, y = (np.load(file, allow_pickle=False).astype(np.float64) for file in (a, b))
        if x.shape != y.shape:
            return None, f"output {index} has shape {y.shape} instead of {x.shape}"
        if not np.isfinite(x).all():
            return None, f"output {index} of the reference holds NaN or infinity"
        if not np.isfinite(y).all():
            return None, f"output {index} holds NaN or infinity"
        norm, error = float(np.linalg.norm(x)), float(np.linalg.norm(y - x))
        if error > 0 and norm == 0:
            return None, f"output {index} should be zero everywhere and is not"
        worst = max(worst, error / norm if norm else 0.0)
    return worst, ""
