"""Thresholds from recorded runs: predictions agree with the policies, run on the arrays that were recorded."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.fitting import speedup
from hasten.passes.steps.fitting_threshold import at, predicted, reaching
from hasten.passes.steps.simulate import Recording, predict

STEPS = 30
TEACACHE = "teacache:threshold=0.3,coefficients=4/0.5/0.01"


@pytest.fixture(scope="module")
def arrays(trajectory):
    return {name: trajectory(STEPS, seed=seed) for seed, name in enumerate(("input", "output", "signal"))}


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.7, 2.0])
@pytest.mark.parametrize(
    "text", [TEACACHE, TEACACHE + ",limit=2", "first-block:limit=5", "dbcache:head=1,warmup=4,cached=9,limit=3"]
)
def test_signals_give_the_masks_that_their_distances_give(arrays, sample_of, text, threshold):
    policy = parse(text)
    sample = sample_of(STEPS, distance=STEPS - 1, arrays=arrays)
    wanted = predict(policy, Recording(signals=list(arrays["signal"])), threshold=threshold)
    assert predicted(policy, sample, threshold) == wanted


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 0.4, 1.5])
@pytest.mark.parametrize("text", ["easycache:warmup=1", "easycache:warmup=4,last=2", "easycache:limit=2,warmup=1"])
def test_inputs_and_outputs_give_the_masks_that_their_distances_give(arrays, sample_of, text, threshold):
    policy = parse(text)
    sample = sample_of(STEPS, distance=STEPS - 1, arrays=arrays)
    inputs, outputs = list(arrays["input"]), list(arrays["output"])
    wanted = predict(policy, Recording(signals=inputs, inputs=inputs, outputs=outputs), threshold=threshold)
    assert predicted(policy, sample, threshold) == wanted


def test_a_call_further_away_than_was_recorded_computes(arrays, sample_of):
    policy = parse("first-block")
    mask = predicted(policy, sample_of(STEPS, distance=3, arrays=arrays), 100.0)
    assert mask == "1000" * 7 + "10"


@pytest.mark.parametrize("wanted", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("text", [TEACACHE, "first-block", "easycache:warmup=1"])
def test_the_threshold_found_reaches_the_speedup_and_a_smaller_one_does_not(sample_of, text, wanted):
    policy = parse(text)
    samples = [sample_of(STEPS, seed=s, distance=STEPS - 1) for s in range(3)]
    found = reaching(policy, samples, 0.95, wanted)
    assert found.speedup >= wanted
    assert found == at(policy, samples, 0.95, found.threshold)
    assert found.speedup == pytest.approx(speedup(found.masks, 0.95))
    assert found.computed == pytest.approx(np.mean([m.count("1") for m in found.masks]))
    assert at(policy, samples, 0.95, found.threshold * 0.98).speedup < wanted


def test_a_speedup_that_no_threshold_reaches_names_the_most_there_is(sample_of):
    samples = [sample_of(STEPS)]
    with pytest.raises(UsageError, match=r"no threshold makes .* 5 times as fast; the most is 1\.8\d times, 16 of 30"):
        reaching(parse("first-block:limit=1,warmup=2"), samples, 1.0, 5.0)


def test_a_policy_without_a_threshold_on_distances_is_refused(sample_of):
    with pytest.raises(UsageError, match="fora has no threshold on recorded distances"):
        predicted(parse("fora"), sample_of(STEPS), 0.1)
