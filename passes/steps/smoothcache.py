"""SmoothCache: masks from error curves that were measured once, one for each kind of module.

``errors[k - 1][n]`` is ``|L(n) - L(n+k)|_1 / |L(n+k)|_1`` of a module's outputs L, averaged over the modules of a kind.
Liu et al., 2411.10510; Roblox/SmoothCache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hasten.errors import UsageError


def schedule(errors: Sequence[Sequence[float]], bound: float, steps: int) -> str:
    """The mask of a run of ``steps`` calls: after a computed call, as many reuse as the bound allows.

    Only the longest distance whose error is within ``bound`` counts, so a shorter one may exceed it. A NaN is never
    within. The first and the last call compute.
    """
    if steps < 1:
        raise UsageError(f"smoothcache: a schedule for {steps} steps was asked for; give at least 1")
    bits = ["0"] * steps
    step = 0
    while step < steps:
        bits[step] = "1"
        within = (k for k in range(len(errors), 0, -1) if step < len(errors[k - 1]) and errors[k - 1][step] <= bound)
        step += 1 + next(within, 0)
    bits[0] = bits[-1] = "1"
    return "".join(bits)


def bits_for(masks: Mapping[str, str], kind: str, index: int) -> str | None:
    """The mask of one module: that of ``kind-index`` if there is one, else of its kind, else None, which computes."""
    return masks.get(f"{kind}-{index}", masks.get(kind))


def merge(masks: Mapping[str, str]) -> str:
    """One mask for all modules together, which computes where any of theirs does."""
    lengths = {len(bits) for bits in masks.values()}
    if len(lengths) != 1:
        raise UsageError(f"smoothcache: masks of {', '.join(map(str, sorted(lengths))) or 'no'} steps; give one length")
    return "".join(max(column) for column in zip(*masks.values(), strict=True))
