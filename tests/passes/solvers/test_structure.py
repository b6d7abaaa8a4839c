"""What a table must do whatever the network: order of evaluations, exact data, exact integrals, identities."""

import numpy as np
import pytest

from hasten.passes.solvers import defects
from hasten.passes.solvers.catalog import build, names
from hasten.passes.solvers.deis import deis
from hasten.passes.solvers.dpm_solver import Interval, dpm_solver, sde_sign_defect
from hasten.passes.solvers.euler import euler, lms
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.unipc import gains, unipc

SD = {"beta_start": 0.00085, "beta_end": 0.012}
DIFFUSION = {p: Process.diffusion(prediction=p, **SD) for p in ("epsilon", "sample", "v_prediction")}
FLOW = Process.flow(3.0)
OF_FLOWS = ("flow-euler", "flow-heun", "dpm-solver", "dpm++3m", "dpm++2s", "unipc", "deis", "lms", "euler", "heun")
TWO_NETWORKS = ("caf", "guided", "ltsp", "ltsp4", "stsp", "stsp4")
OF_DIFFUSION = tuple(n for n in names() if n not in ("flow-euler", "flow-heun", "ipndm", *TWO_NETWORKS))
SMALL = Grid(np.arange(6), *variance_preserving(np.array([9.0, 4.1, 2.3, 1.1, 0.42, 0.21, 0.04])))
LOG_SNR = SMALL.log_snr


def process_of(name):
    return FLOW if name in ("flow-euler", "flow-heun") else DIFFUSION["v_prediction"]


@pytest.mark.parametrize("name", names())
def test_no_evaluation_depends_on_a_later_one(name):
    table = build(name, process_of(name), 7)
    of_outputs = table.response()[:, 1 : 1 + len(table)]
    assert np.array_equal(of_outputs, np.tril(of_outputs, -1))
    assert np.abs(of_outputs).max() > 0.01


@pytest.mark.parametrize("steps", [1, 2, 14, 15, 30])
@pytest.mark.parametrize("name", OF_DIFFUSION)
def test_a_network_that_knows_one_picture_is_followed_on_its_path(name, steps):
    """eps = (y - a c) / b: every input must then be a c + b e with one e throughout; not the end alone."""
    if name == "pndm" and steps < 4:
        return
    for prediction in DIFFUSION:
        text = f"{name}{',' if ':' in name else ':'}compat=none"
        table = build(text, DIFFUSION[prediction], steps)
        if table.noisy:
            continue
        picture, levels, seen = 0.7, iter(table.level.tolist()), []

        def network(y, t, levels=levels, seen=seen, prediction=prediction, picture=picture):
            a, b = next(levels)
            eps = (y - a * picture) / b
            seen.append((y[0] - a * picture) / b)
            return {"epsilon": eps, "sample": 0 * y + picture, "v_prediction": a * eps - b * picture}[prediction]

        end = sample(network, table, np.array([0.4]))[0]
        assert np.allclose(seen, seen[0], rtol=0, atol=1e-9)
        a, b = table.level[-1]
        assert end == pytest.approx(a * picture + b * seen[0], abs=1e-9)


@pytest.mark.parametrize("name", OF_FLOWS)
def test_a_flow_that_knows_one_picture_is_followed_on_its_path(name):
    table = build(name, FLOW, 11)
    picture, levels, seen = 0.7, iter(table.level.tolist()), []

    def network(y, t):
        a, b = next(levels)
        seen.append((y[0] - a * picture) / b)
        return (y - picture) / b

    end = sample(network, table, np.array([0.4]))[0]
    assert np.allclose(seen, 0.4, atol=2e-3)  # the first level may be a little below 1
    assert np.allclose(seen, seen[0], atol=1e-9)
    a, b = table.level[-1]
    assert end == pytest.approx(a * picture + b * seen[0], abs=1e-9)


def integral(form, s, t, power):
    """The exact integral of ``(l - l_s)^power`` from level s to level t, by quadrature."""
    h = LOG_SNR[t] - LOG_SNR[s]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u = (nodes + 1) * h / 2
    speed, factor, scale = {
        "data": (-1, 1, SMALL.signal[t]),
        "noise": (1, 1, -SMALL.noise[t]),
        "sde-data": (-2, 2, SMALL.signal[t]),
        "sde-noise": (1, 2, -SMALL.noise[t]),
    }[form]
    return scale * factor * (weights * np.exp(speed * (h - u)) * u**power).sum() * h / 2


@pytest.mark.parametrize("form", ["data", "noise", "sde-data", "sde-noise"])
def test_exponential_weights_integrate_polynomials_exactly(form):
    s, t = 3, 4
    interval, nodes = Interval(SMALL, s, t, form), [3, 2, 1]
    for power in range(3):
        values = (LOG_SNR[nodes] - LOG_SNR[s]) ** power
        for order in range(power + 1, 4):
            got = interval.gains(nodes[:order], "heun") @ values[:order]
            assert got == pytest.approx(integral(form, s, t, power), rel=1e-11, abs=1e-13)
    # half the first weight in place of the slope's own is exact for constants alone
    midpoint = interval.gains(nodes[:2], "midpoint") @ (LOG_SNR[nodes[:2]] - LOG_SNR[s])
    assert abs(midpoint - integral(form, s, t, 1)) > 1e-3


def test_the_halved_second_difference_and_the_wrong_sign_miss_parabolas():
    interval, nodes = Interval(SMALL, 3, 4, "data"), [3, 2, 1]
    parabola = (LOG_SNR[nodes] - LOG_SNR[3]) ** 2
    assert interval.gains(nodes, "heun", 0.5) @ parabola == pytest.approx(integral("data", 3, 4, 2) / 2, rel=1e-11)
    noisy = Interval(SMALL, 3, 4, "sde-data")
    wrong = noisy.gains(nodes, "heun", sde_sign_defect(noisy)) @ parabola
    assert wrong == pytest.approx(integral("sde-data", 3, 4, 2) - 2 * SMALL.signal[4] * noisy.h**2, rel=1e-11)


@pytest.mark.parametrize("form", ["data", "noise"])
def test_unipc_integrates_polynomials_exactly(form):
    s, t = 3, 4
    for order in (2, 3):
        with_target = [t, s, *range(s - 1, s - order, -1)]
        weights = gains(SMALL, s, order, "bh2", form, corrector=True)
        for power in range(order + 1):
            values = (LOG_SNR[with_target] - LOG_SNR[s]) ** power
            assert weights @ values == pytest.approx(integral(form, s, t, power), rel=1e-10, abs=1e-12)
    predictor = gains(SMALL, s, 3, "bh2", form) @ (LOG_SNR[[3, 2, 1]] - LOG_SNR[s]) ** 2
    assert predictor == pytest.approx(integral(form, s, t, 2), rel=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_and_deis_integrate_polynomials_exactly(order):
    ratio = SMALL.noise / SMALL.signal
    for power in range(order):
        row = order - 1
        history = list(range(row, row - order, -1))
        table = lms(SMALL, order=order).fold()
        weights = np.array([table.B[row, 0], *table.A[row, 0, 1:]])[:order] / SMALL.signal[row + 1]
        exact = (ratio[row + 1] ** (power + 1) - ratio[row] ** (power + 1)) / (power + 1)
        assert weights @ ratio[history] ** power == pytest.approx(exact, rel=1e-10)
        table = deis(SMALL, order=order, lower_order_final=False).fold()
        weights = np.array([table.B[row, 0], *table.A[row, 0, 1:]])[:order] / SMALL.signal[row + 1]
        nodes, shares = np.polynomial.legendre.leggauss(60)
        log = np.log(ratio[row]) + (nodes + 1) / 2 * np.log(ratio[row + 1] / ratio[row])
        exact = (shares * log**power * np.exp(log)).sum() * np.log(ratio[row + 1] / ratio[row]) / 2
        assert weights @ np.log(ratio[history]) ** power == pytest.approx(exact, rel=1e-10)


def same(one, other, tolerance=1e-12):
    a, b = one.response(), other.response()
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_identities_between_methods():
    even = {"lower_order_final": False}
    all_steps = range(len(SMALL))
    predictor = unipc(SMALL, order=2, disable_corrector=all_steps, **even)
    assert same(predictor, dpm_solver(SMALL, order=2, **even))
    third = unipc(SMALL, order=3, disable_corrector=all_steps, **even)
    # the second step is of order 2, where UniPC's rule is the midpoint's
    assert same(third, dpm_solver(SMALL, order=3, compat=None, **even))
    assert not same(third, dpm_solver(SMALL, order=3, **even), 1e-4)
    assert same(deis(SMALL, order=2, **even), dpm_solver(SMALL, order=2, form="noise", slope="heun", **even))
    heun_start = dpm_solver(SMALL, order=3, form="noise", slope="heun", compat=None, **even)
    assert same(deis(SMALL, order=3, **even), heun_start)
    assert same(dpm_solver(SMALL, order=1), dpm_solver(SMALL, order=1, form="noise"))
    first, along = dpm_solver(SMALL, order=1), euler(SMALL)
    assert np.allclose(along.response()[:-1], first.response()[:-1], rtol=1e-12)
    assert np.allclose(along.response()[-1] * SMALL.signal[-1], first.response()[-1], rtol=1e-12)


def test_the_function_b_matters_for_the_predictor_alone():
    for order in (2, 3):
        weights = [gains(SMALL, 3, order, v, "data", corrector=True) for v in ("bh1", "bh2")]
        assert np.allclose(*weights, rtol=1e-11)
    assert np.abs(gains(SMALL, 3, 2, "bh1", "data") - gains(SMALL, 3, 2, "bh2", "data")).max() > 1e-2


def test_noise_of_the_first_order_sde_solver_is_that_of_ddpm():
    process = DIFFUSION["epsilon"]
    texts = "dpm-solver:form=sde-data,order=1,spacing=trailing,end=zero", "ddim:eta=1,spacing=trailing,compat=none"
    sde, ddpm = (build(text, process, 10) for text in texts)
    assert same(sde, ddpm, 1e-10)


@pytest.mark.parametrize("name", OF_DIFFUSION)
def test_prediction_types_describe_the_same_sampler(name):
    responses = []
    for prediction in DIFFUSION:
        table = build(f"{name}:compat=none", DIFFUSION[prediction], 12)
        levels, x = iter(table.level.tolist()), np.linspace(-1, 1, 5)

        def network(y, t, levels=levels, prediction=prediction):
            a, b = next(levels)
            eps = np.tanh(y + 0.1 * t / 1000)
            x0 = (y - b * eps) / a
            return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[prediction]

        noise = np.random.default_rng(0).normal(size=(len(table.noisy), 5))
        responses.append(sample(network, table, x, noise=noise))
    assert np.allclose(responses, responses[0], rtol=1e-8, atol=1e-9)


def variance_at_the_end(table, spread):
    """The mean's factor and the variance of the result for Gaussian data of a standard deviation, without sampling."""
    folded = table.fold()
    state, covariance = np.eye(table.width)[0] * table.init, np.zeros((table.width,) * 2)
    covariance[0, 0] = table.init**2
    for i in range(len(table)):
        a, b = table.level[i]
        # the exact eps of y = a x0 + b eps, x0 ~ N(0, spread^2)
        gain = b / (a**2 * spread**2 + b**2)
        forward = folded.A[i] + np.outer(folded.B[i] * gain, table.input[i])
        covariance = forward @ covariance @ forward.T + np.outer(table.C[i], table.C[i])
        state = forward @ state
    return table.output @ covariance @ table.output


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"order": 1, "form": "sde-data"}, 1),
        ({"order": 2, "form": "sde-data"}, 2),
        ({"order": 2, "form": "sde-data", "slope": "heun"}, 2),
        ({"order": 2, "form": "sde-noise"}, 2),
        ({"order": 3, "form": "sde-data", "compat": None}, 2),
        ({"order": 3, "form": "sde-noise", "compat": None}, 2),
        ({"order": 3, "form": "sde-data"}, 1),  # defects.SDE_SECOND_DIFFERENCE_SIGN
    ],
)
def test_variance_of_sde_solvers_converges(options, order):
    """Order 3 is limited to 2 in the variance by its fresh noise, which is right to second order."""
    errors = []
    for n in (96, 192):
        grid = Grid(np.zeros(n), *variance_preserving(np.geomspace(8, 0.05, n + 1)))
        a, b = grid.signal, grid.noise
        table = dpm_solver(grid, lower_order_final=False, **options)
        start = np.sqrt(a[0] ** 2 * 0.25 + b[0] ** 2)
        table = type(table)(**{**vars(table), "init": start})
        errors.append(abs(variance_at_the_end(table, 0.5) - (a[-1] ** 2 * 0.25 + b[-1] ** 2)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_every_defect_has_a_name_of_its_own():
    assert len({d.name for d in defects.DEFECTS}) == len(defects.DEFECTS) == 13
    assert all(d.where and d.what for d in defects.DEFECTS)
