import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.policy import COMPUTE, DECIDE
from hasten.passes.steps.retained import control_at

RISING = [1 + 0.04 * i for i in range(8)]


@pytest.fixture(scope="module")
def compiled(compile_policies):
    texts = {
        "diffusers": "first-block:threshold=0.1",
        "cache-dit": "first-block:threshold=0.1,at_threshold=compute",
        "dbcache": "dbcache:warmup=3,threshold=0.5,limit=2,cached=4",
        "masked": "dbcache:warmup=1,threshold=0.5,mask=10010000",
        "taylor": "dbcache:warmup=3,threshold=0.5,payload=taylor-residual,order=1",
    }
    return compile_policies({name: parse(text) for name, text in texts.items()}, signal=(2,))


def mask_of(compiled, engine, name, sizes, **options):
    return compiled.run(engine, name, len(sizes), signal=sizes, **options)[0]


def test_the_distance_is_to_the_last_computed_call(compiled, engine):
    assert mask_of(compiled, engine, "diffusers", RISING) == "10010010"


def test_a_distance_equal_to_the_threshold(compiled, engine):
    assert mask_of(compiled, engine, "diffusers", [1, 1.125], threshold=0.125) == "10"
    assert mask_of(compiled, engine, "cache-dit", [1, 1.125], threshold=0.125) == "11"


def test_nan_computes_and_is_forgotten(compiled, engine):
    nan = float("nan")
    # The call after the NaN has nothing to compare with; the one after that has.
    assert mask_of(compiled, engine, "diffusers", [1, 1, nan, 1, 1, 1]) == "101100"
    assert mask_of(compiled, engine, "cache-dit", [1, nan, nan, nan]) == "1111"
    assert mask_of(compiled, engine, "diffusers", [1, float("inf"), 1, 1], threshold=1e9) == "1110"


def test_zero_residuals(compiled, engine):
    assert mask_of(compiled, engine, "diffusers", [0, 0, 1, 1]) == "1010"


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_no_positive_threshold_is_off(compiled, engine, threshold):
    assert mask_of(compiled, engine, "diffusers", [1] * 5, threshold=threshold) == "11111"


def test_warm_up_and_both_limits(compiled, engine):
    # Two in a row at most, four in all.
    assert mask_of(compiled, engine, "dbcache", [1] * 14) == "11100100111111"
    assert mask_of(compiled, engine, "dbcache", [1] * 14, limit=-1) == "11100001111111"
    assert mask_of(compiled, engine, "dbcache", [1] * 5, limit=0) == "11111"


@pytest.mark.parametrize(("steps", "mask"), [(1, "1"), (2, "11"), (3, "111"), (4, "1110")])
def test_short_runs(compiled, engine, steps, mask):
    assert mask_of(compiled, engine, "dbcache", [1] * steps) == mask


def test_the_number_of_reuses_starts_anew_with_a_run(compiled, engine):
    used = {**compiled.fresh["dbcache"], "reused": np.array(4, np.int64), "count": np.array(9, np.int64)}
    states = {**compiled.fresh, "dbcache": used}
    for step in range(3):
        control = control_at(step, 9, threshold=0.5, limit=2)
        states["dbcache"], *_ = compiled.step(engine, states, control, signal=np.ones(2, np.float32))["dbcache"]
    _, compute, _ = compiled.step(
        engine, states, control_at(3, 9, threshold=0.5, limit=2), signal=np.ones(2, np.float32)
    )["dbcache"]
    assert not compute


def test_a_mask_computes_whatever_the_distance(compiled, engine):
    assert mask_of(compiled, engine, "masked", [1] * 8) == "10010000"
    assert mask_of(compiled, engine, "masked", [1, 9, 9, 9, 9, 9, 1, 1]) == "11010010"


def test_a_mask_is_a_wish_to_compute_only():
    decision = parse("dbcache:warmup=2,mask=10010000").decision
    assert decision.forced(8).tolist() == [COMPUTE, COMPUTE, DECIDE, COMPUTE] + [DECIDE] * 4
    with pytest.raises(UsageError, match="made for 8 steps and the run has 9"):
        decision.forced(9)


def test_the_residual_is_extrapolated(compiled, engine):
    # The residual grows by 1 a call: 1, 2, 3 computed, then 4, 5.
    outputs = [np.full(2, 10 + i + 1.0) for i in range(3)] + [np.zeros(2)] * 2
    bits, results, _ = compiled.run(engine, "taylor", 5, signal=[1] * 5, before=[10] * 3 + [20, 30], after=outputs)
    assert bits == "11100"
    assert [r[0] for r in results] == [11, 12, 13, 24, 35]


def test_dbcache_leaves_both_ends_alone():
    policy = parse("dbcache:head=4,foot=2")
    assert (policy.granularity, policy.head, policy.foot) == ("tail", 4, 2)
    assert parse("first-block:threshold=0.1").head == 1
