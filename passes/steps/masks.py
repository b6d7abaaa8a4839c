"""Masks that others published, by name; 1 computes.

``scm-*``: cache-dit's step masks (vipshop), for 28 steps and, for distilled models, 15. ``dit-*`` and
``transformer-*``: the schedules that SmoothCache ships (Roblox), named after model, steps and error bound. ``fora-50``
is its FORA one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.passes.steps.schedules import bits_of_bins


@dataclass(frozen=True)
class Published:
    """``bits`` and where they are from."""

    bits: str
    source: str


def _scm(computes: tuple[int, ...], reuses: tuple[int, ...]) -> Published:
    return Published(bits_of_bins(computes, reuses), "vipshop/cache-dit, steps_mask")


def _smooth(bits: str) -> Published:
    return Published(bits, "Roblox/SmoothCache, smoothcache_schedules")


MASKS: Mapping[str, Published] = {
    "scm-slow": _scm((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "scm-medium": _scm((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "scm-fast": _scm((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "scm-ultra": _scm((4, 1, 1, 1, 1), (3, 5, 5, 7)),
    "scm-15-slow": _scm((6, 2, 2, 1), (1, 1, 1, 1)),
    "scm-15-medium": _scm((4, 2, 2, 1), (1, 1, 2, 2)),
    "scm-15-fast": _scm((3, 2, 1, 1), (1, 2, 2, 3)),
    "scm-15-ultra": _scm((3, 1, 1, 1), (1, 2, 3, 3)),
    "dit-50-0.18": _smooth("10001001001010101010101010101010101010101010101011"),
    "dit-50-0.08": _smooth("1001010" + "1" * 43),
    "dit-30-0.35": _smooth("100101010101010101010101010111"),
    "dit-70-0.08": _smooth("1000100100" + "10" * 28 + "1011"),
    "transformer-50-0.15": _smooth("10100101011101010101010101010101001001001001001011"),
    "fora-50": _smooth("10" * 23 + "1011"),
}
