"""TeaCache's polynomial: how much the region's result changes when its signal changes by so much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import UsageError
from hasten.passes.steps.fitting import Floats, Sample


@dataclass(frozen=True)
class Polynomial:
    """``coefficients``, highest power first, fitted on distances from ``low`` to ``high``, ``points`` of them.

    ``r2`` is the part of the variance that it explains (1: all), ``residual`` the root mean square of what is left.
    ``least`` and ``negative``: its smallest value in the range, and the part of the range where it is below 0.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float
    points: int
    r2: float
    residual: float
    least: float
    negative: float


def points(samples: Sequence[Sample], against: str) -> tuple[Floats, Floats]:
    """The signal's distances of all runs, and those of the ``residual`` or the ``output`` at the same calls."""
    pairs = [(s.values["signal"].to_next()[1:], s.values[against].to_next()[1:]) for s in samples]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


def fit(x: Floats, y: Floats, order: int) -> Polynomial:
    """Fit ``y = p(x)`` by least squares; `UsageError` where the points do not determine the polynomial."""
    needed = 2 * (order + 1)
    if len(x) < needed:
        raise UsageError(
            f"a polynomial of order {order} needs at least {needed} points, and {len(x)} were recorded (one for each "
            "step after a sample's first); record more samples, or fit a lower order"
        )
    coefficients, _, rank, _, _ = np.polyfit(x, y, order, full=True)
    if rank <= order:
        raise UsageError(
            f"a polynomial of order {order} does not follow from distances that are all from {x.min():.6g} to "
            f"{x.max():.6g}; record other samples or more steps, or fit a lower order"
        )
    left = y - np.polyval(coefficients, x)
    spread = float(((y - y.mean()) ** 2).sum())
    curve = np.polyval(coefficients, np.linspace(x.min(), x.max(), 512))
    return Polynomial(
        tuple(map(float, coefficients)),
        low=float(x.min()),
        high=float(x.max()),
        points=len(x),
        r2=1 - float((left**2).sum()) / spread if spread > 0 else 1.0,
        residual=float(np.sqrt((left**2).mean())),
        least=float(curve.min()),
        negative=float((curve < 0).mean()),
    )


def concerns(found: Polynomial, order: int) -> list[str]:
    """What a user should know before trusting the polynomial, each with what to do."""
    said = []
    if found.r2 < 0.5:
        said.append(
            f"the polynomial explains {found.r2:.0%} of the change (R^2 {found.r2:.2f}): the signal says little here; "
            "compare with magcache or a searched mask, which need no signal"
        )
    if found.negative:
        said.append(
            f"the polynomial is negative on {found.negative:.0%} of the fitted range, so small changes put off the "
            f"next computed call; " + ("use sign=clamp0, or a lower order" if order > 1 else "use sign=clamp0")
        )
    return said
