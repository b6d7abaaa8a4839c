"""Winograd's minimal filtering F(m, r) by Toom-Cook interpolation, in exact rational numbers.

One dimension: y = A^T [(G g) * (B^T d)] is the correlation of t = m + r - 1 samples d with r taps g. A^T is the
Vandermonde matrix of the points, G evaluates the taps there and divides by f_i = prod_(k != i) (p_i - p_k), and row i
of B^T holds the coefficients of prod_(k != i) (x - p_k); the last row and column belong to the point at infinity.
Sources: Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, arXiv 1509.09308. Points: Barabasz et
al., arXiv 1803.10986, found that small fractions and their reciprocals lose fewest digits; kappa below says how many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from hasten.errors import UsageError

Matrix = tuple[tuple[Fraction, ...], ...]

POINTS: dict[tuple[int, int], tuple[Fraction, ...]] = {
    (2, 3): (Fraction(0), Fraction(1), Fraction(-1)),
    # Reciprocal pairs: half the rms error of 0, +-1, +-2 at the same cost, and unit ends in the first and last row.
    (4, 3): (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2)),
    (6, 3): tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2"))),
    # The 2x2 phases of an upsampled convolution.
    (2, 2): (Fraction(0), Fraction(1)),
    (4, 2): (Fraction(1, 2), Fraction(-1, 2), Fraction(4, 3), Fraction(-4, 3)),
}
"""Finite interpolation points of F(m, r); infinity is always the last one."""

RHO = {"float32": 2.0**-24 * math.sqrt(1 / 3), "float16": 2.1e-4, "bfloat16": 1.7e-3}
"""Relative rms error of rounding a number to the type."""


SUMMED = 32
"""Channels that are added up in one go, in float32; such sums are then added to each other."""


@dataclass(frozen=True)
class Transform:
    """The matrices of F(m, r): ``bt`` (t, t), ``g`` (t, r), ``at`` (m, t)."""

    m: int
    r: int
    bt: Matrix
    g: Matrix
    at: Matrix

    @property
    def t(self) -> int:
        """Samples in a tile, and multiplications that it costs."""
        return self.m + self.r - 1

    @property
    def kappa(self) -> float:
        """How much one dimension amplifies a rounding error's variance, averaged over the outputs of a tile.

        mean_i sum_j A^T_ij^2 |B^T_j|^2 |G_j|^2 / r, with r output variance from unit variance taps.
        """
        rows = [math.fsum(float(x) ** 2 for x in b) * math.fsum(float(x) ** 2 for x in g) for b, g in self._pairs()]
        return math.fsum(float(a) ** 2 * n for row in self.at for a, n in zip(row, rows, strict=True)) / (
            self.m * self.r
        )

    def _pairs(self) -> list[tuple[Sequence[Fraction], Sequence[Fraction]]]:
        return list(zip(self.bt, self.g, strict=True))

    def expected_error(self, dtype: str, channels: int = 0, summed: int = SUMMED) -> float:
        """Relative rms error of a two-dimensional convolution whose transformed tiles and weights are ``dtype``.

        kappa sqrt(2) rho where sums are wider than the operands. In float32 they are not: the kernels add ``summed``
        channels at a time, and a sum of n random terms in a row has n / 8 times the variance of one rounding
        (measured, within 10 % from 64 to 2560 channels).
        """
        sums = 2 + (summed + channels / summed) / 8 if dtype == "float32" and channels else 1
        return self.kappa * math.sqrt(2 * sums) * RHO[dtype]


@cache
def transform(m: int, r: int, points: tuple[Fraction, ...] | None = None, *, normalised: bool = False) -> Transform:
    """The exact matrices of F(m, r) for t - 1 distinct finite ``points``, by default those of `POINTS`.

    ``normalised`` divides each row of B^T by its l1 norm and multiplies G's by it: a transformed tile is then never
    larger than its input, which keeps float16 from overflowing; it changes no relative error.
    """
    points = POINTS.get((m, r)) if points is None else points
    if points is None:
        known = ", ".join(f"F({a}, {b})" for a, b in POINTS)
        raise UsageError(f"winograd: no interpolation points for F({m}, {r}); give them, or take one of {known}")
    t = m + r - 1
    if len(set(points)) != t - 1 or len(points) != t - 1:
        raise UsageError(f"winograd: F({m}, {r}) takes {t - 1} different points and infinity, not {len(points)}")
    bt: list[list[Fraction]] = []
    g: list[list[Fraction]] = []
    for i, point in enumerate(points):
        others = [p for k, p in enumerate(points) if k != i]
        scale = math.prod((point - p for p in others), start=Fraction(1))
        bt.append([*_polynomial(others), Fraction(0)])
        g.append([point**j / scale for j in range(r)])
    bt.append(_polynomial(points))
    g.append([Fraction(int(j == r - 1)) for j in range(r)])
    at = [[p**i for p in points] + [Fraction(int(i == m - 1))] for i in range(m)]
    if normalised:
        norms = [sum(map(abs, row), Fraction(0)) for row in bt]
        bt = [[x / n for x in row] for row, n in zip(bt, norms, strict=True)]
        g = [[x * n for x in row] for row, n in zip(g, norms, strict=True)]
    return Transform(m, r, *(tuple(map(tuple, rows)) for rows in (bt, g, at)))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of prod (x - root), lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [a - root * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found
