"""Lagrange's polynomials by their coefficients."""

from __future__ import annotations

import numpy as np

from hasten.passes.solvers.prediction import Array


def coefficients(nodes: Array) -> Array:
    """Return row j: the polynomial, by ascending powers, that is 1 at ``nodes[j]`` and 0 at the others; (n, n)."""
    rows = []
    for j, node in enumerate(nodes):
        polynomial = np.ones(1)
        for other in np.delete(nodes, j):
            polynomial = np.convolve(polynomial, np.array([-other, 1.0]) / (node - other))
        rows.append(polynomial)
    return np.array(rows)


def integrals(nodes: Array, target: float) -> Array:
    """Integrate each polynomial from the first node to ``target``, (n,)."""
    h = target - nodes[0]
    powers = np.arange(1, len(nodes) + 1)
    return coefficients(nodes - nodes[0]) @ (h**powers / powers)
