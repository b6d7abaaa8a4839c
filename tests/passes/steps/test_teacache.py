import numpy as np
import pytest

from hasten.passes.steps.catalog import parse
from hasten.passes.steps.policy import relative_l1
from hasten.passes.steps.retained import control_at
from hasten.passes.steps.simulate import fresh
from hasten.passes.steps.teacache import TeaCache
from hasten.passes.steps.teacache_models import MODELS

# Distances of a run of 28 calls that moves most at its ends.
VALLEY = [round(0.06 + 0.22 * (abs(i - 14) / 14) ** 3, 6) for i in range(28)]
# With this before it, a signal (1, d, 0, 0) is exactly d away.
REST = {"previous": np.array([1, 0, 0, 0], np.float32)}
IDENTITY = "teacache:coefficients=1/0,threshold=0.5"


def at(distances):
    return [np.array([1, d, 0, 0], np.float32) for d in distances]


@pytest.fixture(scope="module")
def compiled(compile_policies):
    texts = {
        "flux": "teacache:model=flux",
        "cogvideox-2b": "teacache:model=cogvideox-2b",
        "wan-14b": "teacache:model=wan2.1-t2v-14b",
        "latte": "teacache:model=latte",
        "identity": IDENTITY,
        "loose": IDENTITY + ",strict=false",
        "fitted": IDENTITY + ",fitted=0.25",
        "negative": "teacache:coefficients=-1/0,threshold=0.5",
        "abs": "teacache:coefficients=-1/0,threshold=0.5,sign=abs",
        "clamp0": "teacache:coefficients=-1/0,threshold=0.5,sign=clamp0",
        "share": "teacache:coefficients=0/0,threshold=0.5,first=1,last=0",
        "hidream": "teacache:model=hidream-i1-full",
    }
    return compile_policies({name: parse(text) for name, text in texts.items()})


def mask_of(compiled, engine, name, distances, **options):
    return compiled.run(engine, name, len(distances), signal=at(distances), reset=REST, **options)[0]


def test_a_distance_is_over_the_previous_signal_and_over_all_elements():
    old = np.array([1, -2, 3, -4], np.float32)
    assert relative_l1(old * np.float32(1.1), old) == pytest.approx(0.1, rel=1e-6)
    old, new = np.array([1, 1, 1, 9], np.float32), np.array([2, 1, 1, 9], np.float32)
    assert relative_l1(new, old) == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("model", "distance", "value"),
    [
        ("flux", 0.0, 0.264230861),
        ("flux", 0.1, 0.206847),
        ("flux", 0.2, 0.261995),
        ("flux", 0.3, 0.522130),
        ("flux", 0.0529, 0.180343),
        ("wan2.1-t2v-14b", 0.1, -0.635951),
        ("wan2.1-t2v-14b", 0.2, 0.125989),
        ("latte", 0.3, -5.500081),
    ],
)
def test_a_polynomial_has_its_highest_power_first(model, distance, value):
    decision = TeaCache(MODELS[model].coefficients, 0.1)
    assert decision.estimate(np.float32(distance)) == pytest.approx(value, abs=5e-6)


@pytest.mark.parametrize("model", MODELS)
def test_a_polynomial_in_float32_is_that_in_float64(model):
    at_points = np.linspace(0, 0.1, 11)
    decision = TeaCache(MODELS[model].coefficients, 0.1)
    exact = np.polyval(MODELS[model].coefficients, at_points)
    found = np.array([decision.estimate(np.float32(x)) for x in at_points])
    terms = np.polyval(np.abs(MODELS[model].coefficients), at_points)
    assert np.all(np.abs(found - exact) <= 4e-7 * terms)


@pytest.mark.parametrize(
    ("threshold", "mask"), [(0.25, "1111010101010101010101010111"), (0.4, "1010101001001001001001010101")]
)
def test_flux_over_a_run(compiled, engine, threshold, mask):
    assert mask_of(compiled, engine, "flux", VALLEY, threshold=threshold) == mask


def test_the_sum_goes_to_zero_where_a_call_computes(compiled, engine):
    states, sums = dict(compiled.fresh), []
    decision = compiled.policies["flux"].decision
    state = states["flux"]
    for i, signal in enumerate(at(VALLEY[:6])):
        states["flux"] = {**state, **REST}
        control = control_at(i, 28, threshold=0.4)
        state, compute, _ = compiled.step(engine, states, control, signal=signal)["flux"]
        sums.append((bool(compute), float(state["total"])))
    assert [c for c, _ in sums] == [True, False, True, False, True, False]
    assert [t for _, t in sums] == pytest.approx([0, 0.290520, 0, 0.250044, 0, 0.221943], abs=2e-6)
    assert decision.threshold == 0.25


@pytest.mark.parametrize(
    ("distance", "threshold", "mask"),
    [
        (0.1, 0.25, "101010101011"),
        (0.1, 0.4, "101010101011"),
        (0.1, 0.6, "100100100101"),
        (0.1, 0.8, "100010001001"),
        (0.0, 0.25, "111111111111"),
        (0.0, 0.4, "101010101011"),
    ],
)
def test_fluxs_polynomial_bounds_reuses_in_a_row(compiled, engine, distance, threshold, mask):
    assert mask_of(compiled, engine, "flux", [distance] * 12, threshold=threshold) == mask


def test_a_sum_equal_to_the_threshold_computes(compiled, engine):
    assert mask_of(compiled, engine, "identity", [0.25] * 6) == "101011"
    assert mask_of(compiled, engine, "loose", [0.25] * 6) == "100101"


@pytest.mark.parametrize(("steps", "mask"), [(1, "1"), (2, "11"), (3, "101")])
def test_short_runs(compiled, engine, steps, mask):
    assert mask_of(compiled, engine, "identity", [0.25] * steps) == mask


@pytest.mark.parametrize("name", ["flux", "cogvideox-2b", "wan-14b", "latte", "negative"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_distance_that_is_no_number_computes_and_resets(compiled, engine, name, bad):
    distances = [0.1, 0.1, bad, 0.1, 0.1, 0.1]
    bits, _, state = compiled.run(engine, name, 6, signal=at(distances), reset=REST, threshold=1e9)
    assert bits == "101001"
    assert np.isfinite(state["total"])


@pytest.mark.parametrize("name", ["flux", "cogvideox-2b"])
def test_a_signal_that_was_all_zero_computes(compiled, engine, name):
    signals = [np.zeros(4), np.ones(4), np.ones(4), np.ones(4)]
    assert compiled.run(engine, name, 4, signal=signals, threshold=1.0)[0] == "1101"


def test_a_signal_that_stays_zero_has_not_moved(compiled, engine):
    assert compiled.run(engine, "identity", 4, signal=[np.zeros(4)] * 4)[0] == "1001"


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", ["identity", "negative"])
def test_no_positive_threshold_is_off(compiled, engine, name, threshold):
    assert mask_of(compiled, engine, name, [0.1] * 6, threshold=threshold) == "111111"


def test_what_is_added_where_the_polynomial_is_negative(compiled, engine):
    distances = [0.25] * 8
    assert mask_of(compiled, engine, "negative", distances) == "10000001"
    assert mask_of(compiled, engine, "abs", distances) == "10101011"
    assert mask_of(compiled, engine, "clamp0", distances) == "10000001"
    rising = [0.25] * 4
    _, _, state = compiled.run(engine, "negative", 4, signal=at(rising), reset=REST, known=False)
    assert state["total"] == -0.75
    _, _, state = compiled.run(engine, "clamp0", 4, signal=at(rising), reset=REST, known=False)
    assert state["total"] == 0


def test_distances_beyond_the_fitted_range_compute(compiled, engine):
    assert mask_of(compiled, engine, "fitted", [0.1, 0.25, 0.26, 0.1, 0.1], threshold=10.0) == "10101"


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_a_limit_bounds_reuses_in_a_row(compiled, engine, limit):
    bits = mask_of(compiled, engine, "share", [0.1] * 13, limit=limit)
    assert bits == (("1" + "0" * limit) * 13)[:13]


def test_the_callers_mask_goes_before_everything_but_the_first_call(compiled, engine):
    assert mask_of(compiled, engine, "flux", [float("nan")] * 6, mask="001000") == "101000"
    assert mask_of(compiled, engine, "share", [0.0] * 6, mask="111111") == "111111"


def test_rules_about_the_last_calls_need_their_number(compiled, engine):
    assert mask_of(compiled, engine, "flux", [0.1] * 4, threshold=1.0, known=False) == "1000"


def test_a_share_of_the_run_computes_first(compiled, engine):
    assert mask_of(compiled, engine, "hidream", [0.0] * 20, threshold=9.0)[:4] == "1100"
    assert parse("teacache:model=hidream-i1-full").decision.forced(20).tolist() == [1, 1] + [-1] * 18


def test_a_new_run_does_not_see_the_state_of_the_last(compiled, engine):
    poison = {n: np.full_like(v, -1 if v.dtype == np.int64 else np.nan) for n, v in compiled.fresh["flux"].items()}
    control = control_at(0, 12, threshold=0.4)
    state, compute, result = compiled.step(
        engine, {**compiled.fresh, "flux": poison}, control, signal=np.ones(4, np.float32)
    )["flux"]
    assert compute
    assert (float(state["total"]), int(state["count"])) == (0, 0)
    assert np.all(np.isfinite(state["previous"]))
    assert np.all(np.isfinite(result))


def test_the_residual_of_the_last_computed_call_is_added(compiled, engine):
    inputs = [[1, 2], [3, 3], [0, 0], [7, 7]]
    outputs = [[1.5, 1.5], [9, 9], [9, 9], [8, 9]]
    bits, results, state = compiled.run(
        engine, "identity", 4, before=inputs, after=outputs, signal=at([0.1] * 4), reset=REST, mask="1001"
    )
    assert bits == "1001"
    assert np.array(results).tolist() == [[1.5, 1.5], [3.5, 2.5], [0.5, -0.5], [8, 9]]
    assert state["residual"].tolist() == [1, 2]


def test_half_precision_signals_are_measured_in_float32():
    torch = pytest.importorskip("torch")
    policy = parse("teacache:model=flux")
    old = torch.full((1 << 17,), 1.0, dtype=torch.bfloat16)
    new = old.clone()
    new[: 1 << 14] += 1
    assert float(relative_l1(new, old)) == 0.125
    state = {
        n: torch.as_tensor(v) for n, v in fresh(policy.slots(), {"signal": np.zeros(2), "after": np.zeros(2)}).items()
    }
    control = type(control_at(1, 4))(*map(torch.as_tensor, control_at(1, 4, threshold=0.4)))
    state, compute = policy.decision.decide({**state, "previous": old}, new, control)
    assert state["previous"].dtype == torch.bfloat16
    assert not compute
