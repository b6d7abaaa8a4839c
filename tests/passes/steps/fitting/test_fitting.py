"""Recorded runs as numbers: distances, JSON, damaged recordings, what a mask is worth."""

import json
import math

import numpy as np
import pytest

from hasten.errors import HastenError, UsageError
from hasten.passes.steps.fitting import Moves, Sample, most_computed, moves_of_errors, speedup
from hasten.passes.steps.policy import relative_l1


def test_distances_are_those_of_the_values(trajectory, moves_of):
    values = trajectory(9, seed=1)
    moves = moves_of(values, 4)
    for step in range(9):
        for earlier in range(max(0, step - 4), step):
            assert moves.from_earlier(step, earlier) == pytest.approx(
                float(relative_l1(values[step], values[earlier])), rel=1e-5
            )
    assert math.isnan(moves.from_earlier(7, 2))
    assert math.isnan(moves.from_earlier(3, 3))
    assert moves.to_next()[0] == 0
    assert moves.to_next()[5] == moves.from_earlier(5, 4)


def test_from_zero_nothing_is_no_change_and_anything_is_infinite():
    moves = Moves(np.zeros(3), np.array([[np.nan, 0.0, 2.0]]))
    assert moves.from_earlier(1, 0) == 0
    assert moves.from_earlier(2, 1) == math.inf


def test_errors_to_a_later_call_become_moves():
    errors = np.array([[0.1, 0.2, 0.3, np.nan], [0.4, 0.5, np.nan, np.nan]])
    moves = moves_of_errors(errors)
    np.testing.assert_array_equal(moves.moves, [[np.nan, 0.1, 0.2, 0.3], [np.nan, np.nan, 0.4, 0.5]])
    np.testing.assert_array_equal(moves.size, np.ones(4))


def test_a_sample_survives_json(sample_of):
    sample = sample_of(6, seed=3)
    back = Sample.from_dict(json.loads(json.dumps(sample.as_dict(), allow_nan=False)), 6)
    assert (back.seed, back.label, set(back.values)) == (3, "a circle", set(sample.values))
    for name, moves in sample.values.items():
        np.testing.assert_allclose(back.values[name].size, moves.size, rtol=1e-6)
        np.testing.assert_allclose(back.values[name].moves, moves.moves, rtol=1e-6)
    np.testing.assert_allclose(back.ratios, sample.ratios, rtol=1e-6)
    np.testing.assert_allclose(back.errors["attn1"], sample.errors["attn1"], rtol=1e-6)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c.pop("ratios"), "cannot be read: KeyError 'ratios'"),
        (lambda c: c.update(values=[]), "cannot be read: AttributeError"),
        (lambda c: c["values"]["signal"].update(size=[1.0, 2.0]), "2 entries of signal's size, and its run 6 steps"),
        (lambda c: c["values"]["signal"].update(moves=[[1, "x"]]), "cannot be read: ValueError"),
    ],
)
def test_a_damaged_sample_is_refused(sample_of, damage, said):
    content = sample_of(6).as_dict()
    damage(content)
    with pytest.raises(UsageError, match=said):
        Sample.from_dict(content, 6)


def test_a_recording_with_nan_says_where(sample_of):
    sample = sample_of(6, seed=7)
    sample.check_finite()
    sample.values["residual"].size[4] = np.nan
    with pytest.raises(HastenError, match=r"seed 7, a circle: residual is nan at step 4"):
        sample.check_finite()
    sample = sample_of(6)
    sample.ratios[2] = np.inf
    with pytest.raises(HastenError, match="ratios is inf at step 2"):
        sample.check_finite()


def test_speedup_counts_what_a_reused_call_still_costs():
    assert speedup(["1111"], 0.9) == 1
    assert speedup(["1000"], 1.0) == pytest.approx(4)
    assert speedup(["1000"], 0.8) == pytest.approx(1 / (0.25 + 0.75 * 0.2))
    assert speedup(["1010", "1000"], 1.0) == pytest.approx(1 / 0.375)  # of the total time, not a mean of ratios


@pytest.mark.parametrize("share", [0.5, 0.83, 1.0])
@pytest.mark.parametrize("wanted", [1.0, 1.3, 1.7])
def test_most_computed_is_the_most_that_reaches_the_speedup(share, wanted):
    most = most_computed(wanted, 50, share)
    assert speedup(["1" * most + "0" * (50 - most)], share) >= wanted - 1e-9
    assert most == 50 or speedup(["1" * (most + 1) + "0" * (49 - most)], share) < wanted


def test_a_speedup_beyond_the_region_is_refused_with_the_most_there_is():
    with pytest.raises(UsageError, match=r"leaves out 50% .* are 1\.96 times as fast"):
        most_computed(3, 50, 0.5)
