"""What a network predicts, and the same prediction in other terms.

A noisy sample is ``y = a x0 + b eps`` with signal level a and noise level b: ``a^2 + b^2 = 1`` for diffusion processes
that preserve the variance, ``a + b = 1`` for rectified flow. Whatever the network says is a fixed combination of x0 and
eps, so any two of (y, prediction) give any other: a linear conversion with two scalars.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError, nearest

Array = npt.NDArray[np.float64]

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def convert(prediction: str, quantity: str, a: Any, b: Any) -> tuple[Array, Array]:
    """``(cy, cf)`` with ``quantity = cy y + cf f`` for a network's output f; ``a`` and ``b`` are (M,).

    ``quantity`` is x0, eps or velocity (eps - x0). The network predicts epsilon, the sample, ``v = a eps - b x0``
    (Salimans & Ho, 2202.00512) or the flow's velocity ``eps - x0``.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    one, zero = np.ones_like(a), np.zeros_like(a)
    # f = p x0 + q eps
    said = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-b, a), "flow_prediction": (-one, one)}
    if prediction not in said:
        raise UsageError(
            f"unknown prediction type {prediction!r}; there are {', '.join(PREDICTIONS)}."
            f"{nearest(prediction, PREDICTIONS)}"
        )
    if prediction == "epsilon" and (a == 0).any():
        raise UsageError("epsilon prediction says nothing where the signal level is zero; use v_prediction or sample")
    p, q = said[prediction]
    r, s = {"x0": (1, 0), "eps": (0, 1), "velocity": (-1, 1)}[quantity]
    determinant = a * q - b * p
    return (r * q - s * p) / determinant, (s * a - r * b) / determinant
