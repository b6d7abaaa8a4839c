import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.adacache import CODEBOOKS, AdaCache
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.retained import control_at

DYADIC = "adacache:bounds=0.25/0.5/0.75/1.0/1.25,rates=6/5/4/3/2/1"
NAN = float("nan")


@pytest.fixture(scope="module")
def compiled(compile_policies):
    texts = {
        **{name: f"adacache:codebook={name}" for name in CODEBOOKS},
        "dyadic": DYADIC,
        "moreg": "adacache:codebook=30-fast,moreg=true,frames=2",
        "carried": "adacache:codebook=30-fast,moreg=true,frames=2,reset=false",
        "temporal": "adacache:codebook=30-fast,moreg=true",
    }
    return compile_policies({name: parse(text) for name, text in texts.items()}, tap=(1, 2, 1))


def rate_after(compiled, engine, name, old, new, *, rate=1, step=1, **state):
    """The rate that a computed call plans, from the tapped residual then (old) and now (new)."""
    held = {
        **compiled.fresh[name],
        "reference": np.broadcast_to(np.asarray(old, np.float32), (1, 2, 1)).copy(),
        "rate": np.array(rate, np.int64),
        **{n: np.array(v, np.float32) for n, v in state.items()},
    }
    tap = np.broadcast_to(np.asarray(new, np.float32), (1, 2, 1)).copy()
    made, compute, _ = compiled.step(engine, {**compiled.fresh, name: held}, control_at(step, 100), tap=tap)[name]
    assert compute
    assert int(made["due"]) == step + int(made["rate"])
    return int(made["rate"]), made


@pytest.mark.parametrize(
    ("name", "rates"),
    [("100-fast", (12, 10, 8, 6, 4, 3)), ("30-fast", (6, 6, 6, 5, 5, 1)), ("30-slow", (3, 3, 3, 2, 2, 1))],
)
def test_codebooks(compiled, engine, name, rates):
    factors = (1.02, 1.045, 1.06, 1.08, 1.10, 1.5)
    assert tuple(rate_after(compiled, engine, name, 1, f)[0] for f in factors) == rates


def test_the_distance_is_over_the_planned_rate(compiled, engine):
    assert rate_after(compiled, engine, "100-fast", 1, 1.045, rate=10)[0] == 12


def test_the_last_bound_is_not_compared(compiled, engine):
    assert rate_after(compiled, engine, "100-fast", 1, 6)[0] == 3
    assert rate_after(compiled, engine, "100-fast", 1, 1.999)[0] == 3


def test_the_distance_is_over_the_old_residual(compiled, engine):
    assert rate_after(compiled, engine, "dyadic", 2, 1)[0] == 4  # 0.5
    assert rate_after(compiled, engine, "dyadic", 1, 2)[0] == 2  # 1.0


@pytest.mark.parametrize(("d", "rate"), [(0.25, 5), (0.5, 4), (0.75, 3), (1.0, 2), (1.25, 1), (1.2499, 2), (0.0, 6)])
def test_a_bound_is_strict(compiled, engine, d, rate):
    assert rate_after(compiled, engine, "dyadic", 1, 1 + d)[0] == rate


@pytest.mark.parametrize("name", ["100-fast", "30-fast"])
@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 0), (1, NAN), (NAN, 1), (1, float("inf"))])
def test_nothing_to_compare_with_plans_the_nearest_call(compiled, engine, name, old, new):
    assert rate_after(compiled, engine, name, old, new)[0] == CODEBOOKS[name].codebook[-1][1]


@pytest.mark.parametrize(
    ("steps", "mask"),
    # Call 1 plans six calls on; the last two compute whatever was planned.
    [(1, "1"), (2, "11"), (3, "111"), (4, "1111"), (5, "11011"), (8, "11000011"), (16, "1100000100000111")],
)
def test_still_runs(compiled, engine, steps, mask):
    assert compiled.run(engine, "30-fast", steps, tap=[np.ones((1, 2, 1))] * steps)[0] == mask


def test_a_moving_run_computes_every_call(compiled, engine):
    taps = [np.full((1, 2, 1), 2.0**n) for n in range(10)]
    assert compiled.run(engine, "30-fast", 10, tap=taps)[0] == "1" * 10


def test_a_reused_call_adds_one_residual_for_all_layers(compiled, engine):
    taps = [np.ones((1, 2, 1))] * 8
    _, results, _ = compiled.run(
        engine, "30-fast", 8, tap=taps, before=[[n, -n] for n in range(8)], after=[[n + 3, -n + 4] for n in range(8)]
    )
    assert [r.tolist() for r in results[2:6]] == [[n + 3, -n + 4] for n in range(2, 6)]


def test_one_residual_is_the_sum_of_all_layers():
    rng = np.random.default_rng(0)
    x, layers = rng.standard_normal((2, 4096), np.float32), rng.standard_normal((112, 2, 4096), np.float32) * 0.05
    after = x.copy()
    for layer in layers:
        after = after + layer.astype(np.float32)
    later = rng.standard_normal((2, 4096), np.float32)
    literal, exact = later.copy(), later.astype(np.float64) + layers.astype(np.float64).sum(0)
    for layer in layers:
        literal = literal + layer.astype(np.float32)
    payload = parse("adacache").payload
    collapsed = payload.reuse(payload.store({}, x, after, control_at(0, 2)), later, control_at(1, 2))
    assert np.abs(collapsed - exact).mean() < 1.5 * np.abs(literal - exact).mean()
    assert np.abs(collapsed - exact).mean() < 1e-6


def test_a_limit_and_the_callers_mask(compiled, engine):
    taps = [np.ones((1, 2, 1))] * 9
    assert compiled.run(engine, "30-fast", 9, tap=taps, limit=2)[0] == "110010011"
    assert compiled.run(engine, "30-fast", 9, tap=taps, mask="100000000")[0] == "100000000"


@pytest.mark.parametrize(
    ("frames", "score", "rate"),
    [
        ((1, 1), 0.0, 1),
        ((1, 2.2520325203), 1.0, 5),
        ((1, 2), 0.315751, 1),
        ((1, 3), 8.09234, 1),
        ((1, -1), 2071.64, 1),
        ((0, 0), None, 1),
    ],
)
@pytest.mark.parametrize("name", ["moreg", "temporal"])
def test_motion_between_two_frames(compiled, engine, name, frames, score, rate):
    now = np.array(frames, np.float32)
    # The old residual is a tenth away from the new one, so that d = 0.1.
    now = now.reshape(1, 2, 1)
    found, state = rate_after(compiled, engine, name, now / np.float32(1.1), now, step=9, motion=1.0)
    assert found == rate
    if score is not None:
        assert float(state["motion"]) == pytest.approx(score, rel=1e-4, abs=1e-9)


def test_motion_counts_inside_the_window_only(compiled, engine):
    now = np.ones((1, 2, 1), np.float32)
    rates = [rate_after(compiled, engine, "moreg", now / 1.1, now, step=n - 1, motion=1.0)[0] for n in (3, 4, 26, 27)]
    assert rates == [5, 1, 1, 5]


def test_motion_starts_anew_in_each_run_or_is_carried(compiled, engine):
    for name, score in (("moreg", 1.0), ("carried", 5.0)):
        states = {**compiled.fresh, name: {**compiled.fresh[name], "motion": np.array(5.0, np.float32)}}
        # The first call has nothing to compare with, and measures no motion.
        state, *_ = compiled.step(engine, states, control_at(0, 30), tap=np.ones((1, 2, 1), np.float32))[name]
        assert float(state["motion"]) == score


def test_a_nan_does_not_stay_in_the_score(compiled, engine):
    tap = np.array([1, NAN], np.float32).reshape(1, 2, 1)
    rate, state = rate_after(compiled, engine, "moreg", 1, tap, step=9, motion=1.0)
    assert rate == 1
    assert float(state["motion"]) == 1


def test_a_first_call_in_a_used_state_is_a_first_call(compiled, engine):
    used = {
        "reference": np.full((1, 2, 1), NAN, np.float32),
        "rate": np.array(6, np.int64),
        "due": np.array(99, np.int64),
        "count": np.array(7, np.int64),
        "residual": np.full(2, NAN, np.float32),
    }
    states = {**compiled.fresh, "30-fast": used}
    state, compute, _ = compiled.step(engine, states, control_at(0, 30), tap=np.ones((1, 2, 1), np.float32))["30-fast"]
    assert compute
    assert (int(state["rate"]), int(state["due"]), int(state["count"])) == (1, 1, 0)


def test_codebooks_of_ones_own():
    decision = parse(DYADIC).decision
    assert isinstance(decision, AdaCache)
    assert decision.codebook[0] == (0.25, 6)
    for text in ("adacache:bounds=0.5", "adacache:bounds=0.5/0.25,rates=3/2/1", "adacache:bounds=0.5,rates=2"):
        with pytest.raises(UsageError, match="a codebook of one's own"):
            parse(text)
    with pytest.raises(UsageError, match="window=9/4 is not first/last"):
        parse("adacache:moreg=true,window=9/4")


@pytest.mark.parametrize(("pivot", "score"), [(0.385, (1 / 3 / 0.385) ** 8), (1 / 3, 1.0), (1 / 6, 256.0)])
def test_the_pivot_is_the_motion_whose_score_is_one(pivot, score):
    motion = parse(f"adacache:moreg=true,frames=2,pivot={pivot!r}").decision.motion
    tap = np.array([1, 2], np.float32).reshape(1, 2, 1)
    assert float(motion.score(tap, np.int64(9))) == pytest.approx(score, rel=1e-4)
