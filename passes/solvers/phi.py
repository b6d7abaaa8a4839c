"""phi_k, the integrals behind every exponential integrator."""

from __future__ import annotations

import math


def phi(k: int, z: float) -> float:
    """Return ``integral over u in [0, 1] of e^(z (1 - u)) u^(k - 1) / (k - 1)!``; phi_1(z) is (e^z - 1) / z.

    The recursion ``phi_{k+1} = (phi_k - 1 / k!) / z`` loses digits for small z, where the Taylor series is used.
    """
    if abs(z) < 1:
        return sum(z**j / math.factorial(j + k) for j in range(20))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value
