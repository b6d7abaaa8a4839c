"""Schedules and curves from recorded runs."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.fitting import speedup
from hasten.passes.steps.fitting_schedule import (
    interval_reaching,
    magnitude_reaching,
    mean_errors,
    mean_ratios,
    smooth,
    smooth_reaching,
)


def errors_of(steps, distance=3, scale=1.0):
    rows = np.full((distance, steps), np.nan)
    for k in range(1, distance + 1):
        rows[k - 1, : steps - k] = k * (0.02 + 0.01 * np.arange(steps - k)) * scale
    return rows


@pytest.mark.parametrize(
    ("alpha", "mask"), [(0.05, "100101111111"), (0.1, "100010101011"), (0.2, "100010001001"), (0.0, "1" * 12)]
)
def test_the_reference_schedules(alpha, mask):
    found = smooth({"attn1": errors_of(12)}, alpha)
    assert found.masks == {"attn1": mask}
    assert found.merged == mask


def test_kinds_have_masks_of_their_own_and_one_that_serves_both():
    found = smooth({"attn1": errors_of(12), "ff": errors_of(12, scale=2)}, 0.1)
    assert found.masks["attn1"] == "100010101011"
    assert found.masks["ff"] == smooth({"ff": errors_of(12)}, 0.05).masks["ff"]
    assert found.merged == "".join(max(a, b) for a, b in zip(*found.masks.values(), strict=True))


@pytest.mark.parametrize("wanted", [1.0, 1.4, 2.0, 2.6])
def test_the_smallest_error_bound_with_the_speedup(wanted):
    rng = np.random.default_rng(1)
    errors = {"ff": np.sort(rng.uniform(0.01, 0.5, (3, 40)), axis=0)}
    errors["ff"][[0, 1, 1, 2, 2, 2], [39, 38, 39, 37, 38, 39]] = np.nan
    found = smooth_reaching(errors, wanted, 0.97)
    assert speedup([found.merged], 0.97) >= wanted
    bounds = np.unique(errors["ff"][np.isfinite(errors["ff"])])
    below = bounds[bounds < found.alpha]
    if len(below):  # halving relies on more reuses for a larger bound, which holds for the next smaller one at least
        assert speedup([smooth(errors, float(below[-1])).merged], 0.97) < wanted


def test_a_speedup_beyond_the_recorded_distance_is_refused():
    with pytest.raises(UsageError, match=r"no error bound gives a speed-up of 6; at most 3 calls in a row reuse"):
        smooth_reaching({"ff": errors_of(40)}, 6, 1.0)


def test_curves_are_averaged_over_samples(sample_of):
    samples = [sample_of(9, seed=s) for s in (0, 1)]
    samples[1].errors["attn1"][0, 2] += 0.1
    samples[1].ratios[3] += 0.2
    np.testing.assert_allclose(mean_errors(samples)["attn1"][0, 2], samples[0].errors["attn1"][0, 2] + 0.05)
    ratios = mean_ratios(samples)
    assert ratios[0] == 1.0
    assert ratios[3] == pytest.approx(samples[0].ratios[3] + 0.1)
    assert len(ratios) == 9


@pytest.mark.parametrize("wanted", [1.2, 2.0, 2.5])
def test_the_smallest_magnitude_threshold(wanted):
    ratios = "1/" + "/".join(f"{1 + 0.05 * np.sin(i):.4f}" for i in range(29))
    policy = parse(f"magcache:ratios={ratios}")
    threshold, mask = magnitude_reaching(policy, wanted, 1.0, 30)
    assert speedup([mask], 1.0) >= wanted
    again = parse(f"magcache:ratios={ratios},threshold={threshold}").decision.mask(30)
    assert mask == "".join(str(int(b)) for b in again)
    less = parse(f"magcache:ratios={ratios},threshold={threshold * 0.96}").decision.mask(30)
    assert 30 / less.sum() < wanted


def test_a_magnitude_threshold_that_the_limit_forbids():
    policy = parse("magcache:model=flux,limit=1,retention=0.5")
    with pytest.raises(UsageError, match=r"speed-up of 3 with limit=1 and retention=0\.5; the most is 1\.33"):
        magnitude_reaching(policy, 3, 1.0, 28)


def test_the_smallest_interval():
    assert interval_reaching(parse("deepcache"), 2.0, 1.0, 12) == (2, "101010101010")
    assert interval_reaching(parse("fora"), 1.0, 0.8, 6) == (1, "111111")
    interval, mask = interval_reaching(parse("fora"), 2.0, 0.8, 12)
    assert (interval, mask) == (4, "100010001001")
    with pytest.raises(UsageError, match=r"no interval gives a speed-up of 5"):
        interval_reaching(parse("deepcache"), 5.0, 0.8, 12)
