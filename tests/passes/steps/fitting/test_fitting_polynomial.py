"""TeaCache's polynomial from recorded distances."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.fitting_polynomial import concerns, fit, points


def test_finds_the_polynomial_that_made_the_points():
    wanted = (40.0, -20.0, 5.0, 0.5, 0.02)
    x = np.linspace(0.02, 0.3, 60)
    found = fit(x, np.polyval(wanted, x), 4)
    np.testing.assert_allclose(found.coefficients, wanted, rtol=1e-6)
    assert (found.low, found.high, found.points) == (0.02, 0.3, 60)
    assert found.r2 == pytest.approx(1)
    assert found.residual < 1e-9
    assert concerns(found, 4) == []


def test_tells_how_much_it_explains():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 0.2, 400)
    noise = rng.normal(0, 0.01, 400)
    found = fit(x, x + noise, 1)
    spread = np.var(x + noise)
    assert found.r2 == pytest.approx(1 - found.residual**2 / spread, abs=1e-9)
    assert found.residual == pytest.approx(0.01, rel=0.1)
    (said,) = concerns(fit(x, 0.5 + 0.1 * rng.normal(size=400), 1), 1)
    assert "R^2 0.0" in said


def test_a_polynomial_that_goes_below_zero_is_told():
    x = np.linspace(0.0, 1.0, 50)
    found = fit(x, (x - 0.2) * (x - 0.6), 2)
    assert found.least == pytest.approx(-0.04, abs=1e-4)
    assert found.negative == pytest.approx(0.4, abs=0.01)
    assert any("sign=clamp0" in said for said in concerns(found, 2))


@pytest.mark.parametrize(("count", "order"), [(9, 4), (3, 1), (0, 1)])
def test_too_few_points_for_the_order(count, order):
    x = np.linspace(0.1, 0.2, count)
    with pytest.raises(UsageError, match=rf"order {order} needs at least {2 * order + 2} points, and {count} were"):
        fit(x, x, order)


def test_points_that_are_all_alike_determine_nothing():
    with pytest.raises(UsageError, match=r"does not follow from distances that are all from 0\.1 to 0\.1"):
        fit(np.full(20, 0.1), np.linspace(0, 1, 20), 2)


def test_points_are_those_of_all_samples_without_their_first_call(sample_of):
    samples = [sample_of(8, seed=s) for s in (0, 1)]
    x, y = points(samples, "output")
    assert len(x) == len(y) == 14
    assert x[7] == samples[1].values["signal"].from_earlier(1, 0)
    assert y[13] == samples[1].values["output"].from_earlier(7, 6)
