"""Where between the noisiest and the cleanest level a sampler stops: Karras, exponential, beta; shifts of flows."""

from __future__ import annotations

import math

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.prediction import Array

LEVELS = ("model", "karras", "exponential", "lu", "beta")
"""``model``: the training schedule's own at the visited times; ``lu``: even in log-SNR, the levels of ``exponential``
(diffusers rounds their times differently)."""


def karras(largest: float, smallest: float, count: int, *, rho: float = 7.0) -> Array:
    """Return levels even in their rho-th root, (count,), descending (Karras et al., 2206.00364)."""
    ramp = np.linspace(0, 1, count)
    first, last = largest ** (1 / rho), smallest ** (1 / rho)
    return np.asarray((first + ramp * (last - first)) ** rho)


def exponential(largest: float, smallest: float, count: int) -> Array:
    """Return levels even in the logarithm, (count,), descending."""
    return np.exp(np.linspace(math.log(largest), math.log(smallest), count))


def beta(largest: float, smallest: float, count: int, *, shape: float = 0.6) -> Array:
    """Return levels at quantiles of Beta(shape, shape), (count,), descending (Lee et al., 2407.12173)."""
    quantiles = np.array([beta_quantile(p, shape) for p in 1 - np.linspace(0, 1, count)])
    return smallest + quantiles * (largest - smallest)


def chosen(kind: str, largest: float, smallest: float, count: int) -> Array:
    """Return ``count`` levels of a kind from ``largest`` to ``smallest``."""
    if kind == "karras":
        return karras(largest, smallest, count)
    return beta(largest, smallest, count) if kind == "beta" else exponential(largest, smallest, count)


def shifted(levels: Array, shift: float) -> Array:
    """Flow levels moved towards the noisy end for large pictures (Esser et al., 2403.03206).

    ``shift = e^mu`` is the "dynamic" shift of FLUX.
    """
    return np.asarray(shift * levels / (1 + (shift - 1) * levels))


def stretched(levels: Array, last: float) -> Array:
    """Flow levels stretched away from 1 so that the last one is ``last`` (LTX-Video, 2501.00103)."""
    if levels[-1] == 1:
        raise UsageError("flow levels: the only level is 1, which no stretch moves; leave terminal out or take more")
    return 1 - (1 - levels) / ((1 - levels[-1]) / (1 - last))


def time_of(ratios: Array, model: Array) -> Array:
    """Return the training times at which the model's noise-to-signal ratios are ``ratios``, fractional.

    ``model`` (T,) ascends; interpolated in the logarithm, and clamped to 0 .. T - 1.
    """
    logs, wanted = np.log(model), np.log(np.maximum(ratios, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(model) - 2)
    weight = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))


def beta_quantile(p: float, shape: float) -> float:
    """Return the p-quantile of Beta(shape, shape), to about 1e-14, by Newton's method inside a shrinking bracket."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if p > 0.5:
        return 1 - beta_quantile(1 - p, shape)
    log_norm = 2 * math.lgamma(shape) - math.lgamma(2 * shape)
    low, high = 0.0, 0.5
    # Near zero the distribution is x^shape / (shape B): a first guess that is never far off.
    x = min((p * shape * math.exp(log_norm)) ** (1 / shape), 0.5)
    for _ in range(100):
        error = _beta_cdf(x, shape, log_norm) - p
        low, high = (low, x) if error > 0 else (x, high)
        density = math.exp((shape - 1) * (math.log(x) + math.log1p(-x)) - log_norm)
        step = x - error / density
        following = step if low < step < high else (low + high) / 2
        if abs(following - x) <= 1e-16 * x:
            break
        x = following
    return x


def _beta_cdf(x: float, shape: float, log_norm: float) -> float:
    """Sum the hypergeometric series of the incomplete beta integral; x is at most 1/2, so it converges fast."""
    term, total, n = 1.0, 1.0 / shape, 0
    while term > 1e-18 * total:
        n += 1
        term *= (n - shape) / n * x
        total += term / (shape + n)
    return math.exp(shape * math.log(x) - log_norm) * total
