"""Constant acceleration flow, CAF (Park et al., 2411.00322): two networks, one of which is asked once.

Time runs from 0 (noise) to 1 (data), ``x_t = x_0 + v t + a t^2 / 2`` with a constant velocity and acceleration. The
velocity network is evaluated at the start alone; the acceleration network sees the sample and that velocity.
"""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.table import SolverTable

VELOCITY, ACCELERATION = 0, 1
"""Which network a row evaluates."""


def caf(steps: int, *, inverse: bool = False, fraction: int | None = None) -> SolverTable:
    """Build CAF: ``steps`` + 1 evaluations; latents: the sample, and the velocity, the second input of acceleration.

    ``x <- x + dt v + dt (2 i + 1) / (2 steps) a(x, i / steps, v)``, exact for any number of steps where the
    acceleration is constant. ``inverse`` goes from data to noise. ``fraction``: times are told in whole parts of
    1 / fraction, rounded down, as the authors' program does with 1000.
    """
    if steps < 1:
        raise UsageError(f"caf: {steps} sampling steps were asked for; at least 1 is needed")
    if fraction is not None and fraction < 1:
        raise UsageError(f"caf: fraction is {fraction}; times are told in whole parts of 1 / fraction, so at least 1")
    dt = 1 / steps
    start = np.arange(steps) * dt
    if inverse:
        start = start[::-1] + dt
    middle = start + (-dt if inverse else dt) / 2
    sign = -1.0 if inverse else 1.0
    m = steps + 1
    a, b, condition = np.tile(np.eye(2), (m, 1, 1)), np.zeros((m, 2)), np.zeros((m, 2))
    a[0, 1, 1], b[0, 1] = 0, 1
    a[1:, 0, 1], b[1:, 0], condition[1:, 1] = sign * dt, sign * dt * middle, 1
    time = np.append(1.0 if inverse else 0.0, start)
    return SolverTable(
        time=time if fraction is None else np.floor(time * fraction + 1e-9) / fraction,
        input=np.tile([1.0, 0.0], (m, 1)),
        A=a,
        B=b,
        C=np.zeros((m, 2)),
        cy=np.zeros(m),
        cf=np.ones(m),
        output=np.array([1.0, 0.0]),
        clean=np.zeros((m, 2)),
        condition=condition,
        network=np.append(VELOCITY, np.full(steps, ACCELERATION)),
    )
