"""Decisions known before the run: masks, intervals, windows, MagCache, SmoothCache, DeepCache."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.magcache import RATIOS, interpolate
from hasten.passes.steps.masks import MASKS
from hasten.passes.steps.plan import planned
from hasten.passes.steps.policy import DECIDE
from hasten.passes.steps.schedules import bits_of_bins, bits_of_steps
from hasten.passes.steps.simulate import replay
from hasten.passes.steps.smoothcache import bits_for, merge, schedule

FLUX = "magcache:model=flux,threshold=0.24,limit=5,retention=0.1,interpolation=nearest"
NAN = float("nan")


def bits(text, steps):
    return "".join(str(int(b)) for b in parse(text).decision.mask(steps))


@pytest.fixture(scope="module")
def compiled(compile_policies):
    texts = {
        "mask": "mask:1001",
        "fora": "fora:interval=3,last=1",
        "taylorseer": "taylorseer:interval=4,order=0,warmup=3,after=14",
        "deepcache": "deepcache:interval=3",
        "magcache": FLUX,
        "spectrum": "spectrum:history=2",
    }
    return compile_policies({name: parse(text) for name, text in texts.items()})


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("mask", "1001"),
        ("fora", "1001001001001001"),
        ("taylorseer", "1110100010001011"),
        ("deepcache", "1001001001001001"),
        ("spectrum", "1111101010010001"),
    ],
)
def test_a_graph_follows_the_plan(compiled, engine, name, mask):
    assert compiled.run(engine, name, len(mask))[0] == mask


@pytest.mark.parametrize(
    ("name", "mask"),
    [("mask", "1" * 9), ("fora", "100100100"), ("taylorseer", "111010001"), ("spectrum", "1" * 9)],
)
def test_a_graph_left_to_itself(compiled, engine, name, mask):
    # Rules that need no memory hold without a plan; the others compute.
    assert compiled.run(engine, name, 9, known=False)[0] == mask


def test_no_reuse_where_the_limit_is_none(compiled, engine):
    assert compiled.run(engine, "fora", 5, known=False, limit=0)[0] == "11111"


def test_a_run_of_unknown_length_has_no_plan():
    with pytest.raises(UsageError, match=r"plans the whole run.*steps=N"):
        planned(parse("mask:1001").decision, None)


def test_a_mask_for_another_number_of_steps():
    assert bits("mask:10010", 5) == "10010"
    with pytest.raises(UsageError, match="made for 5 steps and the run has 6; give a mask of 6, or stretch=nearest"):
        bits("mask:10010", 6)
    assert [bits("mask:10010", n) for n in (1, 2)] == ["1", "11"]
    # Relative positions 0, 0.6, 1.1, 1.7, 2.3, 2.9, 3.4, 4.
    assert bits("mask:10010,stretch=nearest", 8) == "10000110"
    assert bits("mask:10010,stretch=nearest", 3) == "100"


def test_the_first_call_computes_whatever_the_mask_says():
    assert bits("mask:0010", 4) == "1010"


def test_steps_and_bins():
    assert bits_of_steps((0, 3, 4), 6) == "100110"
    assert bits_of_steps((2,), 3) == "101"
    with pytest.raises(UsageError, match="step 6 is not in a run of 6"):
        bits_of_steps((0, 6), 6)
    assert bits_of_bins((4, 1, 1), (2, 3)) == "11110010001"
    assert bits_of_bins((2, 1), (1, 2)) == "110100"
    with pytest.raises(UsageError, match="they take turns"):
        bits_of_bins((2,), (1, 2))
    assert bits("mask:computed=0/3/4,steps=6", 6) == "100110"
    assert bits("mask:computed_bins=4/1/1,reused_bins=2/3", 11) == "11110010001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask", "give one of bits, computed and computed_bins; none given"),
        ("mask:1001,computed=1/2", "bits and computed given"),
        ("mask:computed=1/2", "steps=N"),
        ("mask:10012", "neither 1"),
        ("mask:scm-fas", "Did you mean 'scm-fast'"),
    ],
)
def test_masks_that_cannot_be_meant(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("name", "computed", "steps"),
    [
        ("dit-50-0.18", 24, 50),
        ("dit-50-0.08", 46, 50),
        ("dit-30-0.35", 16, 30),
        ("dit-70-0.08", 34, 70),
        ("fora-50", 26, 50),
        ("transformer-50-0.15", 24, 50),
        ("scm-slow", 18, 28),
        ("scm-medium", 15, 28),
        ("scm-fast", 11, 28),
        ("scm-ultra", 8, 28),
    ],
)
def test_published_masks(name, computed, steps):
    assert (MASKS[name].bits.count("1"), len(MASKS[name].bits)) == (computed, steps)
    assert bits(f"mask:{name}", steps) == MASKS[name].bits
    assert bits(f"smoothcache:schedule={name}", steps) == MASKS[name].bits


def test_fora_is_the_published_mask():
    assert bits("fora", 50) == MASKS["fora-50"].bits


def test_spectrum_windows():
    assert bits("spectrum", 50) == "11111010100100010000100001000001000000100000001000"
    assert bits("spectrum:flex=3", 50) == "11111010000100000001000000000010000000000000100000"
    assert bits("spectrum", 3) == "111"


def test_taylorseer_interval():
    assert bits("taylorseer:interval=4,warmup=3", 16) == "1110100010001000"
    assert bits("taylorseer:interval=1", 8) == "1" * 8


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        (FLUX + ",never=11", "1110010001010000010000010010"),
        (FLUX, "1110010001000001000001000010"),
        ("magcache:model=flux", "1111110101000100010001001011"),
        ("magcache:model=flux,limit=0", "1" * 28),
        ("magcache:model=flux,threshold=0", "1" * 28),
        ("magcache:model=flux,threshold=9,limit=-1", "1" * 6 + "0" * 22),
    ],
)
def test_magcache(text, mask):
    assert bits(text, 28) == mask


def test_magcache_where_the_error_equals_the_threshold():
    text = "magcache:ratios=1/1.25/1/1/1/1,threshold=0.25,limit=9,retention=0.1"
    assert bits(text, 6) == "101000"
    assert bits(text + ",at_threshold=compute", 6) == "110000"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 20, 50])
def test_magcache_in_short_and_other_runs(steps):
    mask = bits(FLUX, steps)
    assert len(mask) == steps
    assert mask[0] == "1"


def test_the_product_of_ratios():
    flux = RATIOS["flux"]
    assert len(flux) == 28
    assert np.prod(flux) == pytest.approx(1.402, abs=5e-4)
    for steps, product in ((14, 1.110), (20, 1.229), (50, 2.210)):
        assert np.prod(interpolate(flux, steps, "nearest")) == pytest.approx(product, abs=5e-4)
        assert np.prod(interpolate(flux, steps, "log-cumulative")) == pytest.approx(np.prod(flux))
    assert interpolate(flux, 28, "nearest").tolist() == list(flux)


@pytest.mark.parametrize(
    ("steps", "mask"),
    [(1, "1"), (2, "11"), (3, "101"), (4, "1001"), (5, "10001"), (8, "10001001"), (10, "1000100011"),
     (12, "100010001001"), (13, "1000100010001")],
)  # fmt: skip
def test_smoothcache_without_errors(steps, mask):
    assert schedule([[0.0] * max(0, steps - k) for k in (1, 2, 3)], 0.0, steps) == mask


@pytest.mark.parametrize(("bound", "mask"), [(0.05, "100101111111"), (0.1, "100010101011"), (0.2, "100010001001")])
def test_smoothcache_with_rising_errors(bound, mask):
    errors = [[k * (0.02 + 0.01 * i) for i in range(12 - k)] for k in (1, 2, 3)]
    assert schedule(errors, bound, 12) == mask


def test_smoothcache_tests_the_longest_distance_alone():
    assert schedule([[9.0] * 7, [9.0] * 6, [0.0] * 5], 0.1, 8) == "10001001"
    assert schedule([[NAN] * 7, [NAN] * 6, [NAN] * 5], 0.1, 8) == "1" * 8
    with pytest.raises(UsageError, match="at least 1"):
        schedule([[0.0]], 0.1, 0)


def test_which_mask_a_module_has():
    masks = {"attn": "1010", "attn-0": "1100", "mlp": "1001"}
    assert [bits_for(masks, "attn", i) for i in (0, 1)] == ["1100", "1010"]
    assert bits_for(masks, "cross", 0) is None
    assert merge(masks) == "1111"
    assert merge({"attn": "1000", "mlp": "1010"}) == "1010"
    with pytest.raises(UsageError, match="masks of 2, 4 steps"):
        merge({"a": "10", "b": "1001"})


class Emitter:
    """Returns 10, 11, 12, … as one array that a caller may change."""

    def __init__(self):
        self.calls = 0

    def __call__(self, before, step):
        self.calls += 1
        return np.array([9.0 + self.calls])


@pytest.mark.parametrize(
    ("mask", "values"),
    [("101011", [10, 10, 11, 11, 12, 13]), ("110011", [10, 11, 11, 11, 12, 13]), ("0010", [10, 10, 11, 11])],
)
def test_a_reused_module_returns_its_last_value(mask, values):
    emitter = Emitter()
    played = replay(parse("mask:" + mask + ",payload=value"), emitter, [np.zeros(1)] * len(mask))
    assert [float(o[0]) for o in played.outputs] == values
    assert emitter.calls == played.mask.count("1")


def test_the_next_run_is_like_the_first():
    policy, emitter = parse("mask:1001,payload=value"), Emitter()
    values = [float(o[0]) for _ in range(2) for o in replay(policy, emitter, [np.zeros(1)] * 4).outputs]
    assert values == [10, 10, 10, 11, 12, 12, 12, 13]


def test_a_caller_may_change_what_it_got():
    given = []

    def region(before, step):
        given.append(np.array([5.0]))
        return given[-1]

    policy = parse("mask:100,payload=value")
    played = replay(policy, region, [np.zeros(1)] * 3)
    played.outputs[0] *= 2
    assert played.outputs[1] == 5
    assert played.state["value"] == 5


def test_deepcache_leaves_the_inner_levels_out():
    policy = parse("deepcache:interval=3,level=2")
    assert (policy.granularity, policy.level, policy.payload.name) == ("deep", 2, "value")
    assert bits("deepcache:interval=3", 7) == "1001001"
    assert planned(policy.decision, 4) == [1, 0, 0, 1]
    assert DECIDE not in planned(policy.decision, 9)
