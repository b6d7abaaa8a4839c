"""Predictions, concerns, and properties that every policy has."""

import re

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.simulate import Recording, concerns, predict, replay

POLICIES = [
    "teacache:model=flux,threshold=0.6",
    "teacache:model=wan2.1-t2v-14b",
    "teacache:coefficients=1/0,threshold=0.3",
    "first-block:threshold=0.5",
    "dbcache:warmup=2,threshold=0.8",
    "easycache:threshold=1.5,warmup=2",
    "adacache:codebook=30-fast",
    "adacache:codebook=100-fast,moreg=true",
    "magcache:model=flux,threshold=0.3",
    "spectrum",
    "taylorseer:interval=3",
    "fora:interval=4",
]
STATIC = ("magcache", "spectrum", "taylorseer", "fora")


def walk(seed, steps, bad=()):
    """A random walk of signals, NaN at the calls in ``bad``."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.standard_normal((steps, 2, 4)).astype(np.float32) * 0.2, axis=0) + 2
    path[list(bad)] = np.nan
    return list(path)


def play(text, seed, steps, *, bad=(), **options):
    signals = walk(seed, steps, bad)
    return replay(
        parse(text), lambda before, step: before * 0.9 + step, signals, signals=signals, taps=signals, **options
    )


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 17, 50])
def test_forced_calls_compute(text, steps):
    for seed in range(3):
        mask = play(text, seed, steps).mask
        forced = parse(text).decision.forced(steps)
        assert mask[0] == "1"
        assert all(bit == "1" for bit, wish in zip(mask, forced, strict=True) if wish == 1)


@pytest.mark.parametrize("text", [t for t in POLICIES if not t.startswith(STATIC)])
@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_limits_are_respected(text, limit):
    for seed in range(5):
        runs = play(text, seed, 40, limit=limit, threshold=1e9).mask.split("1")
        assert max(map(len, runs)) <= limit


def test_the_number_of_reuses_is_respected():
    for seed in range(5):
        mask = play("dbcache:warmup=2,threshold=0.8,cached=5", seed, 40, threshold=1e9).mask
        assert mask == "11" + "0" * 5 + "1" * 33


@pytest.mark.parametrize("text", [t for t in POLICIES if not t.startswith((*STATIC, "adacache"))])
def test_a_nan_is_never_reused_and_never_stays(text):
    for seed in range(5):
        played = play(text, seed, 40, bad=(9, 20, 21), threshold=1e9)
        assert all(played.mask[n] == "1" for n in (9, 20, 21))
        assert "0" in played.mask[30:]
        assert np.isfinite(played.outputs[-1]).all()


@pytest.mark.parametrize("text", [t for t in POLICIES if t.startswith("adacache")])
def test_a_nan_inside_the_region_plans_the_nearest_call(text):
    for seed in range(5):
        # Every second call would be late: the ones after a NaN that was measured come as soon as the codebook allows.
        clean = play(text, seed, 40).mask
        seen = clean.index("1", 5)
        rate = parse(text).decision.codebook[-1][1]
        assert play(text, seed, 40, bad=(seen,)).mask[seen : seen + rate + 1] == "1" + "0" * (rate - 1) + "1"


@pytest.mark.parametrize("text", [t for t in POLICIES if not t.startswith((*STATIC, "adacache"))])
def test_a_threshold_of_zero_is_off(text):
    assert play(text, 0, 20, threshold=0.0).mask == "1" * 20


@pytest.mark.parametrize("text", POLICIES)
def test_the_callers_mask_is_followed(text):
    mask = "".join(str(b) for b in np.random.default_rng(3).integers(0, 2, 25))
    assert play(text, 1, 25, mask=mask).mask == "1" + mask[1:]


@pytest.mark.parametrize("text", POLICIES)
def test_a_run_that_computes_every_call_is_the_region(text):
    signals = walk(4, 12)
    played = play(text, 4, 12, mask="1" * 12)
    assert all(np.array_equal(o, s * 0.9 + i) for i, (o, s) in enumerate(zip(played.outputs, signals, strict=True)))


def test_a_residual_is_added_once():
    played = replay(
        parse("fora:interval=4,payload=residual"), lambda b, _: b + 1, [np.full(2, float(n)) for n in range(4)]
    )
    assert [float(o[0]) for o in played.outputs] == [1, 2, 3, 4]


def test_predictions_from_distances_and_from_signals_are_one():
    policy = parse("teacache:coefficients=1/0,threshold=0.5")
    signals = [np.array([2.0**n]) for n in range(6)]
    assert (
        predict(policy, Recording(signals=signals)) == predict(policy, Recording(distances=[0] + [1.0] * 5)) == "111111"
    )
    assert predict(policy, Recording(distances=[0.25] * 6)) == "101011"
    assert predict(policy, Recording(distances=[0.25] * 6), threshold=9.0) == "100001"
    assert predict(policy, Recording(distances=[0.25] * 8), threshold=9.0, limit=2) == "10010011"


def test_predictions_of_other_policies():
    rising = [np.array([1 + 0.04 * i]) for i in range(8)]
    assert predict(parse("first-block:threshold=0.1"), Recording(signals=rising)) == "10010010"
    assert predict(parse("mask:1001"), Recording(outputs=[np.zeros(1)] * 4)) == "1001"
    x, y = [np.array([10.0 - n]) for n in range(10)], [np.array([5 + 0.125 * n]) for n in range(10)]
    recorded = Recording(signals=x, inputs=x, outputs=y)
    # Each computed call finds the recorded output; the signal does not depend on reuses here.
    assert predict(parse("easycache:threshold=0.05,warmup=3"), recorded) == "1110010011"
    assert predict(parse("adacache"), Recording(taps=[np.ones((2, 4))] * 8)) == "11000011"


@pytest.mark.parametrize("text", ["first-block:threshold=0.1", "adacache"])
def test_what_is_missing_is_named(text):
    with pytest.raises(
        UsageError, match=r"looks at its (signal \(probe\)|tap \(attention-residual\)) at each of 4 calls"
    ):
        predict(parse(text), Recording(outputs=[np.zeros(1)] * 4))


@pytest.mark.parametrize(
    ("text", "distances", "message"),
    [
        ("teacache:model=flux,threshold=0.1", [0.1] * 9, "threshold 0.1 never lets a call reuse.*raise it"),
        ("teacache:coefficients=1/0,threshold=5", [0.1] * 9, "threshold 5 is never reached: all 7 calls.*lower it"),
        ("teacache:coefficients=1/0,threshold=0", [0.1] * 9, "threshold 0 switches teacache off"),
        ("teacache:model=wan2.1-t2v-14b", [0.05, 0.3, 0.05, 0.3] * 3, "negative at 5 of 11 distances, from 0.05 on"),
        ("teacache:coefficients=1/0,threshold=0.3,fitted=0.2", [0.1, 0.3] * 5, "5 of 9 distances are beyond 0.2"),
    ],
)
def test_concerns(text, distances, message):
    found = concerns(parse(text), Recording(distances=distances))
    assert any(re.search(message, line) for line in found), found


def test_no_concerns():
    assert concerns(parse("teacache:coefficients=1/0,threshold=0.3"), Recording(distances=[0.1] * 12)) == []
    assert concerns(parse("teacache:coefficients=1/0,threshold=9,limit=2"), Recording(distances=[0.1] * 12)) == []
    assert concerns(parse("mask:1001"), Recording(outputs=[np.zeros(1)] * 4)) == []
