"""What is known of a run's decisions before it begins: the caller's mask, the policy's schedule, its forced calls."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.errors import UsageError
from hasten.passes.steps.policy import Decision

Mask = str | Sequence[int]
"""1 computes, 0 reuses, one for each step: ``"1001"``, or numbers or booleans."""


def parse_mask(mask: Mask) -> list[int]:
    """Read a mask; `UsageError` for anything but 0 and 1."""
    values = [str(int(v)) if isinstance(v, bool) else str(v) for v in mask]
    if not values or not set(values) <= {"0", "1"}:
        raise UsageError(f"mask: {mask!r} given; give 1 (compute) and 0 (reuse), one for each step")
    return [int(v) for v in values]


def planned(decision: Decision, steps: int | None, mask: Mask | None = None) -> list[int]:
    """``Control.force`` for each call of a run of ``steps`` calls; calls beyond the list are left to the decision.

    ``mask`` goes before everything. Where ``steps`` is None, rules about the last calls cannot hold, and a policy that
    plans the whole run is refused.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"steps: a run of {steps} was asked for; give at least 1")
    if mask is not None:
        wanted = parse_mask(mask)
        if steps is not None and len(wanted) != steps:
            raise UsageError(f"mask: {len(wanted)} decisions for a run of {steps} steps; give one a step")
        return wanted
    if steps is None:
        if decision.mask(2) is not None:
            raise UsageError(f"{decision.name} plans the whole run, so it must know how many steps that has: steps=N")
        return []
    schedule = decision.mask(steps)
    return [int(v) for v in (decision.forced(steps) if schedule is None else schedule)]


def planned_behind(decision: Decision, steps: int, first: int, mask: Mask | None = None) -> list[int]:
    """`planned` for a run of ``steps`` calls without its ``first``, whose first call computes whatever is said of it.

    A schedule, or the caller's mask, says of each call what it says of it in the whole run.
    """
    if first and mask is None and decision.mask(steps) is None:
        return planned(decision, steps - first)
    return planned(decision, steps, mask)[first:]
