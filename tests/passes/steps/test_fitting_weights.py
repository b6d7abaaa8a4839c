"""Weights fitted to the products of recorded results."""

import numpy as np
import pytest

from hasten.passes.steps.catalog import parse
from hasten.passes.steps.fitting_weights import Fit
from hasten.passes.steps.simulate import replay

STEPS = 9
BITS = "110010010"


def products(results):
    flat = np.stack([np.ravel(r) for r in results])
    return flat @ flat.T


def results(order, seed=3):
    """Polynomials of the call's number, with vectors for coefficients."""
    rng = np.random.default_rng(seed)
    coefficients = rng.standard_normal((order + 1, 40))
    return [sum(c * n**k for k, c in enumerate(coefficients)) for n in range(STEPS)]


def test_a_line_is_extrapolated_as_by_taylor():
    fit = Fit(products(results(1)), 2)
    assert fit.weights((4, 1), 6) == pytest.approx([1 + 2 / 3, -2 / 3], rel=1e-4)
    assert fit.weights((0,), 1) == pytest.approx([1, 0])


@pytest.mark.parametrize(("order", "history"), [(0, 1), (1, 2), (2, 3)])
def test_a_mask_with_fitted_weights_runs_as_if_nothing_were_reused(order, history):
    given = results(order)
    fit = Fit(products(given), history)
    bits = "1" * history + "0" * 2 + "1" + "0" * (STEPS - history - 3)
    weights = "/".join(map(repr, fit.of_mask(bits)))
    policy = parse(f"mask:bits={bits},granularity=output,payload=fitted,history={history},weights={weights}")
    played = replay(policy, lambda _, step: given[step], [np.zeros(40)] * STEPS)
    assert played.mask == bits
    for made, wanted in zip(played.outputs, given, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3 * np.abs(given).max())
    assert fit.error(bits) < 1e-2 * np.sqrt(np.trace(fit.products))


def test_weights_add_up_to_one_whatever_was_recorded():
    rng = np.random.default_rng(1)
    fit = Fit(products(list(rng.standard_normal((STEPS, 60)))), 3)
    rows = np.reshape(fit.of_mask(BITS), (-1, 3))
    assert len(rows) == BITS.count("0")
    assert rows.sum(axis=1) == pytest.approx(np.ones(len(rows)))
    equal = Fit(np.ones((STEPS, STEPS)), 3)  # results that never change: no difference to fit
    assert np.isfinite(equal.of_mask(BITS)).all()


def test_no_other_weights_of_that_sum_are_better():
    rng = np.random.default_rng(2)
    made = np.cumsum(rng.standard_normal((STEPS, 60)), axis=0)
    fit = Fit(products(list(made)), 3)
    best = fit.weights((5, 3, 2), 7)

    def missed(weights):
        return np.linalg.norm(made[7] - weights @ made[[5, 3, 2]])

    for _ in range(50):
        moved = best + 0.05 * (change := rng.standard_normal(3)) - 0.05 * change.mean()
        assert missed(moved) >= missed(best) - 1e-6


def test_the_error_of_a_mask_is_that_of_each_gaps_sum():
    made = results(2)
    fit = Fit(products(made), 1)
    alone = np.linalg.norm(sum(made[n] - made[1] for n in (2, 3)))
    behind = np.linalg.norm(made[8] - made[7])
    assert fit.error("110011110") == pytest.approx(alone + behind)
    assert fit.error("1" * STEPS) == 0
