"""What depends on the number of the step alone: SmoothCache's schedule, MagCache's ratios, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten.errors import UsageError
from hasten.passes.steps.fitting import Floats, Sample, speedup
from hasten.passes.steps.magcache import MagCache
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.schedules import Interval
from hasten.passes.steps.smoothcache import merge, schedule

Errors = Mapping[str, Floats]


@dataclass(frozen=True)
class Schedule:
    """``masks`` by kind of module from the error bound ``alpha``, and the one that serves them all."""

    alpha: float
    masks: Mapping[str, str]

    @property
    def merged(self) -> str:
        return merge(self.masks)


def mean_errors(samples: Sequence[Sample]) -> Errors:
    """The error curves of each kind, averaged over the samples: (K, N), NaN where n + k is past the run."""
    kinds = samples[0].errors
    return {kind: np.mean([s.errors[kind] for s in samples], axis=0) for kind in kinds}


def smooth(errors: Errors, alpha: float) -> Schedule:
    """SmoothCache's schedule of each kind of module."""
    rows = {kind: curves.tolist() for kind, curves in errors.items()}
    return Schedule(alpha, {kind: schedule(r, alpha, len(r[0])) for kind, r in rows.items()})


def smooth_reaching(errors: Errors, wanted: float, share: float) -> Schedule:
    """The schedule of the smallest error bound with the wanted speed-up; `UsageError` where there is none.

    Nothing changes between two recorded errors, so these are the only bounds to try.
    """
    bounds = np.unique(np.concatenate([c[np.isfinite(c)] for c in errors.values()]))
    best = smooth(errors, float(bounds[-1]))
    low, high = 0, len(bounds) - 1
    if speedup([best.merged], share) < wanted:
        most = max((smooth(errors, float(b)) for b in bounds), key=lambda s: speedup([s.merged], share))
        if speedup([most.merged], share) < wanted:
            distance = len(next(iter(errors.values())))
            raise UsageError(
                f"smoothcache: no error bound gives a speed-up of {wanted:g}; at most {distance} calls in a row reuse, "
                f"which gives {speedup([most.merged], share):.3g}: record with a larger distance, or ask for less"
            )
        return most
    while low < high:
        middle = (low + high) // 2
        found = smooth(errors, float(bounds[middle]))
        if speedup([found.merged], share) >= wanted:
            best, high = found, middle
        else:
            low = middle + 1
    return best


def mean_ratios(samples: Sequence[Sample]) -> tuple[float, ...]:
    """MagCache's ratios, averaged over the samples; the first has no predecessor and is 1."""
    return (1.0, *np.mean([s.ratios[1:] for s in samples], axis=0).tolist())


def magnitude_reaching(policy: Policy, wanted: float, share: float, steps: int) -> tuple[float, str]:
    """The smallest threshold of a MagCache policy with the wanted speed-up, and its mask; `UsageError` for none."""
    assert isinstance(policy.decision, MagCache)
    best = "1" * steps
    for threshold in np.geomspace(1e-4, 10, 400).tolist():
        decision = replace(policy.decision, threshold=threshold)
        mask = "".join(str(int(bit)) for bit in decision.mask(steps))
        if mask.count("0") > best.count("0"):
            best = mask
        if speedup([mask], share) >= wanted:
            return float(f"{threshold:.4g}"), mask
    raise UsageError(
        f"magcache: no threshold gives a speed-up of {wanted:g} with limit={policy.decision.limit} and "
        f"retention={policy.decision.retention:g}; the most is {speedup([best], share):.3g}: loosen these, or ask for "
        "less"
    )


def interval_reaching(policy: Policy, wanted: float, share: float, steps: int) -> tuple[int, str]:
    """The smallest interval of computed calls with the wanted speed-up, and its mask; `UsageError` for none."""
    assert isinstance(policy.decision, Interval)
    mask = "1" * steps
    for interval in range(1, steps + 1):
        mask = "".join(str(int(bit)) for bit in replace(policy.decision, interval=interval).mask(steps))
        if speedup([mask], share) >= wanted:
            return interval, mask
    raise UsageError(
        f"{policy.name}: no interval gives a speed-up of {wanted:g}; one computed call in {steps} gives "
        f"{speedup([mask], share):.3g}: ask for less, or for a larger region"
    )
