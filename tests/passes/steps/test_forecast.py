import numpy as np
import pytest

from hasten.passes.steps.catalog import parse
from hasten.passes.steps.forecast import Chebyshev, Table, Taylor
from hasten.passes.steps.meancache import TABLES, noise_levels, rows
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.retained import control_at
from hasten.passes.steps.schedules import Mask

SPECTRUM_STEPS = (0, 1, 2, 3, 4, 6, 8, 11)
SPECTRUM_WEIGHTS = (0.113129, 0.001472, -0.067460, -0.098737, -0.097195, -0.013860, -0.184886, 1.307791)


@pytest.fixture(scope="module")
def compiled(compile_policies):
    policies = {f"taylor-{n}": Policy("taylorseer", Mask("1"), Taylor(n)) for n in range(5)}
    policies["residual"] = Policy("taylorseer", Mask("1"), Taylor(1, of="residual"))
    policies["spectrum"] = Policy("spectrum", Mask("1"), Chebyshev(history=8))
    policies["short"] = Policy("spectrum", Mask("1"), Chebyshev(history=3, degree=2, mix=1.0, span=20))
    table, history = rows((0, 1, 4), (0, 2, 0), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    policies["mean"] = Policy("meancache", Mask("11001"), Table(table, history))
    return compile_policies(policies)


def mask_of(steps, computed):
    return "".join("1" if n in computed else "0" for n in range(steps))


@pytest.mark.parametrize(("order", "forecast"), [(0, (33, 33, 33)), (1, (45, 57, 69)), (2, (46.5, 63, 82.5))])
def test_taylor_as_diffusers_has_it(compiled, engine, order, forecast):
    outputs = [[2 * n * n + 1, -n] for n in range(8)]
    mask = "11101000"
    bits, results, _ = compiled.run(engine, f"taylor-{order}", 8, after=outputs, mask=mask)
    assert bits == mask
    assert [float(r[0]) for r in results[5:]] == pytest.approx(forecast)


@pytest.mark.parametrize("order", range(5))
def test_a_polynomial_of_the_order_is_exact_to_first_order_and_a_constant_to_any(compiled, engine, order):
    lines = [[3.0, 2 * n - 7] for n in range(9)]
    _, results, _ = compiled.run(engine, f"taylor-{order}", 9, after=lines, mask="111110000")
    assert [float(r[0]) for r in results] == pytest.approx([3.0] * 9, rel=1e-5)
    if order:
        assert [float(r[1]) for r in results] == pytest.approx([2 * n - 7 for n in range(9)], rel=1e-4)


def test_fewer_stored_calls_lower_the_order(compiled, engine):
    outputs = [[n * n, 1] for n in range(5)]
    _, results, _ = compiled.run(engine, "taylor-4", 5, after=outputs, mask="10010")
    # One call is stored, then two: a constant, then a line.
    assert [float(r[0]) for r in results] == pytest.approx([0, 0, 0, 9, 12])


def test_a_residual_is_extrapolated_and_added(compiled, engine):
    inputs = [[10 * n, 0] for n in range(4)]
    outputs = [[10 * n + n, 0] for n in range(4)]
    _, results, _ = compiled.run(engine, "residual", 4, before=inputs, after=outputs, mask="1100")
    assert [float(r[0]) for r in results] == [0, 11, 22, 33]


def test_the_weights_of_spectrum():
    calls = np.array(SPECTRUM_STEPS[::-1], np.int64)
    weights = Chebyshev(history=8).weights(calls, control_at(13, 50))
    assert np.array(weights)[::-1] == pytest.approx(SPECTRUM_WEIGHTS, abs=2e-6)
    assert sum(weights) == pytest.approx(0.960254, abs=2e-6)


def test_spectrum_over_a_run(compiled, engine):
    values = np.random.default_rng(0).standard_normal((14, 2))
    mask = mask_of(14, SPECTRUM_STEPS)
    # A run of 14 calls, mapped as one of 50: the caller does not say how long it is.
    _, results, _ = compiled.run(engine, "spectrum", 14, after=values, mask=mask, known=False)
    expected = np.array(SPECTRUM_WEIGHTS) @ values[list(SPECTRUM_STEPS)]
    assert results[13] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_the_ridge_fit_is_that_of_a_solver(compiled, engine, known):
    values = np.random.default_rng(1).standard_normal((6, 2))
    mask = mask_of(6, range(known)) if known < 3 else "110100"
    _, results, _ = compiled.run(engine, "short", 6, after=values, mask=mask)
    at = np.flatnonzero([b == "1" for b in mask])
    basis = np.polynomial.chebyshev.chebvander(at / 10 - 1, 2)
    wanted = np.polynomial.chebyshev.chebvander(np.array([5 / 10 - 1]), 2)[0]
    fitted = np.linalg.solve(basis.T @ basis + 0.1 * np.eye(3), basis.T @ values[at])
    assert results[5] == pytest.approx(wanted @ fitted, abs=2e-5)


def test_stored_tensors_of_an_earlier_run_are_forgotten(compiled, engine):
    for name in ("taylor-2", "spectrum", "mean"):
        used = {
            "stored": np.full_like(compiled.fresh[name]["stored"], np.nan),
            "calls": np.arange(len(compiled.fresh[name]["calls"]), dtype=np.int64)[::-1].copy() + 40,
        }
        states = {**compiled.fresh, name: used}
        states[name], *_ = compiled.step(engine, states, control_at(0, 9, force=1), after=np.ones(2, np.float32))[name]
        assert states[name]["calls"].tolist() == [0] + [-1] * (len(used["calls"]) - 1)
        _, compute, result = compiled.step(engine, states, control_at(1, 9, force=0))[name]
        assert not compute
        assert np.isfinite(result).all()


def test_the_mean_velocity():
    made, history = rows((0, 1), (0, 2), (1.0, 0.9, 0.8, 0.7))
    assert history == 2
    ((step, computed, weights),) = made
    assert (step, computed) == (2, 1)
    assert np.dot(weights, (2.5, 2.0)) == pytest.approx(2.625)
    assert rows((0, 1), (0, 1), (1.0, 0.9, 0.8, 0.7)) == ((), 1)


def test_mean_velocity_in_a_sampler_is_the_papers_formula():
    """Against the recursion on latents, of a run with Euler steps."""
    levels = noise_levels(12, 3.0)
    computed, orders = (0, 1, 2, 4, 7, 11), (0, 0, 2, 3, 5)
    table, history = rows(computed, orders, levels)
    by_step = {s: w for s, _, w in table}
    rng = np.random.default_rng(2)
    given = {s: rng.standard_normal() for s in computed}
    x, xs, vs = 1.0, [1.0], []
    stored = []
    for i in range(12):
        if i in given:
            v, stored = given[i], [given[i], *stored]
            follows = orders[computed.index(i)] if i != computed[-1] else 0
            mine = v
        else:
            j = max(0, i - max(1, follows))
            span = levels[i] - levels[j]
            v = vs[-1] - (vs[j] - (xs[i] - xs[j]) / span) / span * (levels[i + 1] - levels[i])
            weights = by_step.get(i, (1.0,))
            mine = sum(w * h for w, h in zip(weights, stored, strict=False))
        assert mine == pytest.approx(v)
        vs.append(v)
        x += v * (levels[i + 1] - levels[i])
        xs.append(x)
    assert history >= 2


def test_the_table_in_a_graph(compiled, engine):
    outputs = [[2.0, 1], [2.5, 2], [0, 0], [0, 0], [7, 7]]
    bits, results, _ = compiled.run(engine, "mean", 5, after=outputs, mask="11001")
    assert bits == "11001"
    assert float(results[2][0]) == pytest.approx(2.625)
    # After another computed call than the table was made for, the newest is repeated.
    _, results, _ = compiled.run(engine, "mean", 5, after=outputs, mask="10001")
    assert [float(r[0]) for r in results[:4]] == [2.0] * 4


@pytest.mark.parametrize("model", TABLES)
def test_published_schedules(model):
    for count, budget in TABLES[model].items():
        assert len(budget.computed) == count
        assert len(budget.orders) == count - 1
        policy = parse(f"meancache:model={model},computed={count}")
        assert policy.decision.mask(50).sum() == count
        for _, _, weights in policy.payload.rows:
            # A constant velocity stays as it is.
            assert sum(weights) == pytest.approx(1)


def test_spectrum_keeps_what_its_schedule_computes():
    policy = parse("spectrum")
    assert policy.decision.mask(50).sum() <= policy.payload.history
