"""What a random generator is begun with, of a run's seed and a picture's place: a picture depends on the two alone."""

from __future__ import annotations

from typing import Any

from hasten.errors import UsageError

LARGEST = 2**64 - 1
PLACES = 24
"""Bits of a picture's place, which a seed goes above."""
MIXED_FROM = 2 ** (32 - PLACES)
"""Seeds from here on are mixed with the place: torch's generator on a CPU reads 32 bits, of a larger seed above the
place the last 8 alone, and noise would repeat every 256 seeds."""


def check_seed(seed: Any) -> int:
    """``seed`` as a number; `UsageError` for what is no whole number from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed: {seed!r} is not a whole number; give one from 0 to 2**64 - 1")
    if not 0 <= seed <= LARGEST:
        raise UsageError(f"seed: {seed} given; give 0 or more, up to 2**64 - 1")
    return seed


def of_picture(seed: int, place: int) -> int:
    """The generator's seed for the picture at ``place`` of a run, from 0 to 2^64 - 1."""
    if check_seed(seed) >= MIXED_FROM:
        return _mixed(seed, place)
    return (seed << PLACES) + place


def of_run(seed: int) -> int:
    """A seed for noise that is made in an engine, which holds it as a signed number, from 0 to 2^63 - 1."""
    return seed if check_seed(seed) >> 63 == 0 else _mixed(seed, 0) >> 1


def _mixed(seed: int, place: int) -> int:
    """SplitMix64 (Steele et al., OOPSLA 2014): one number of 64 bits of both."""
    x = (seed + (place + 1) * 0x9E3779B97F4A7C15) & LARGEST
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & LARGEST
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & LARGEST
    return x ^ (x >> 31)
