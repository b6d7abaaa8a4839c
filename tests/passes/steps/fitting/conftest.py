"""Recorded runs made from arrays, so that what is said of them can be checked against the arrays."""

import numpy as np
import pytest

from hasten.passes.steps.fitting import Moves, Sample


def _trajectory(steps, *, seed=0, size=24, rough=0.3):
    """Arrays that move unevenly: (steps, size) float32."""
    rng = np.random.default_rng(seed)
    paces = rng.uniform(0.02, rough, (steps, 1))
    return (1 + np.cumsum(rng.normal(size=(steps, size)) * paces, axis=0)).astype(np.float32)


def _moves_of(values, distance):
    steps = len(values)
    moves = np.full((distance, steps), np.nan)
    for apart in range(1, distance + 1):
        for n in range(apart, steps):
            moves[apart - 1, n] = np.abs(values[n] - values[n - apart]).mean()
    return Moves(np.abs(values).mean(axis=1).astype(np.float64), moves)


def _sample_of(steps, *, seed=0, distance=4, arrays=None):
    """A sample of random arrays, or of ``arrays`` by name."""
    arrays = arrays or {
        n: _trajectory(steps, seed=seed * 10 + i) for i, n in enumerate(("input", "output", "residual"))
    }
    arrays = {"signal": _trajectory(steps, seed=seed + 99), **arrays}
    errors = np.full((distance, steps), np.nan)
    for apart in range(1, distance + 1):
        errors[apart - 1, : steps - apart] = apart * (0.02 + 0.01 * np.arange(steps - apart))
    return Sample(
        seed,
        "a circle",
        {name: _moves_of(values, distance) for name, values in arrays.items()},
        np.linspace(1.0, 1.1, steps),
        {"attn1": errors},
    )


@pytest.fixture(scope="session")
def trajectory():
    """Make arrays."""
    return _trajectory


@pytest.fixture(scope="session")
def moves_of():
    """Reduce arrays."""
    return _moves_of


@pytest.fixture(scope="session")
def sample_of():
    """Make a sample."""
    return _sample_of
