"""The best path over segments, against all masks there are."""

from itertools import combinations

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.fitting_path import best_mask, empty, from_moves, measured, segment

STEPS = 9


def errors(seed, longest=STEPS):
    rng = np.random.default_rng(seed)
    found = empty(STEPS, longest)
    found[np.isnan(found)] = rng.integers(1, 6, np.isnan(found).sum()) / 4  # dyadic: many ties, exact sums
    return found


def costs(mask, found):
    computed = [n for n, bit in enumerate(mask) if bit == "1"]
    return [found[i, j] for i, j in zip(computed, [*computed[1:], STEPS], strict=True)]


def masks(computed):
    for chosen in combinations(range(1, STEPS), computed - 1):
        yield "".join("1" if n == 0 or n in chosen else "0" for n in range(STEPS))


@pytest.mark.parametrize("computed", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("seed", range(5))
def test_no_mask_is_better(seed, computed):
    found = errors(seed)
    ranks = {"sum": sum, "minimax": lambda c: sorted(c, reverse=True)}
    for rank, cost in ranks.items():
        best = best_mask(found, computed, rank)
        assert best.count("1") == computed
        assert cost(costs(best, found)) == min(cost(costs(m, found)) for m in masks(computed))


def test_minimax_goes_on_to_the_second_largest_error():
    found = np.full((4, 5), np.inf)
    found[0, 1] = found[0, 2] = found[1, 4] = 3.0
    found[2, 4], found[1, 3], found[3, 4] = 1.0, 0.0, 0.0
    assert best_mask(found, 2, "minimax") == "1010"  # 3 and 1; the other has 3 and 3


def test_the_longest_segment_bounds_what_can_be_had():
    found = errors(0, longest=2)
    assert "000" not in best_mask(found, 3)
    with pytest.raises(UsageError, match="2 computed of 9 steps cannot be had with at most 2 reuses in a row"):
        best_mask(found, 2)


def test_segments_are_measured_alone():
    asked = []

    def error(mask):
        asked.append(mask)
        return float(mask.count("0")) if mask != "1011" else float("nan")

    found = measured(4, 2, error)
    assert sorted(asked) == sorted(["1011", "1001", "1101", "1100", "1110"])
    assert segment(1, 4, 4) == "1100"
    np.testing.assert_array_equal(
        found,
        [[np.inf, 0, np.inf, 2, np.inf], [np.inf, np.inf, 0, 1, 2], [np.inf] * 3 + [0, 1], [np.inf] * 4 + [0]],
    )


def test_recorded_distances_add_up_along_a_segment(trajectory, moves_of):
    values = trajectory(6, seed=2)
    found = from_moves(moves_of(values, 3), longest=5)

    def gone(n, kept):
        return np.abs(values[n] - values[kept]).mean() / np.abs(values[n]).mean()

    assert found[1, 2] == 0
    assert found[1, 4] == pytest.approx(gone(2, 1) + gone(3, 1), rel=1e-5)
    assert found[2, 6] == pytest.approx(gone(3, 2) + gone(4, 2) + gone(5, 2), rel=1e-5)
    assert found[1, 6] == np.inf  # four reuses, and three calls were measured
