"""What a table must do whatever the network: order of evaluations, exact data, exact integrals, identities."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.catalog import build, names
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.deis import deis
from hasten.passes.solvers.dpm_singlestep import dpm_singlestep
from hasten.passes.solvers.dpm_solver import Interval, dpm_solver, sde_sign_defect
from hasten.passes.solvers.euler import euler, lms
from hasten.passes.solvers.flow_euler import flow_euler
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


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_row_is_finite_at_both_ends(end, spacing):
    """No signal at the first level, no noise at the last: the table's coefficients, and what it makes of values."""
    process = Process.diffusion(prediction="v_prediction", zero_snr=True)
    built = 0
    for name in OF_DIFFUSION:
        for steps in (1, 2, 3, 16):
            given = {"spacing": spacing, "end": end}
            if name.startswith("deis"):
                del given["end"]  # it ends at the training's least noise
            given |= {"offset": "1"} if spacing == "leading" else {}
            text = name + (",", ":")[":" not in name] + ",".join(f"{k}={v}" for k, v in given.items())
            try:
                table = build(text, process, steps)
            except UsageError as refused:
                message = str(refused)
            else:
                message = ""
            if message:
                assert any(why in message for why in ("signal level is zero", "zero noise level", "at least 4")), text
                continue
            built += 1
            noise = np.ones((len(table.noisy), 3))
            assert np.isfinite(sample(lambda y, t: np.tanh(y), table, np.array([-1.0, 0.1, 2.0]), noise=noise)).all()
            assert np.isfinite(table.response()).all()
    assert built > 40


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


def test_eulers_method_on_a_flow_is_that_of_the_exponential_integrators():
    levels = np.array([0.98, 0.8, 0.55, 0.3, 0.1, 0.0])
    grid = Grid(1000 * levels[:-1], 1 - levels, levels, path="flow")
    given = {"prediction": "flow_prediction"}
    table = flow_euler(5, sigmas=levels[:-1].tolist())
    assert same(euler(grid, **given), table)
    assert same(dpm_solver(grid, order=1, **given), table)
    assert same(unipc(grid, order=1, disable_corrector=range(5), **given), table)
    assert np.array_equal(table.level, np.stack([grid.signal, grid.noise], 1))


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_ddim_without_noise_is_the_first_order_solver_of_the_ode(steps):
    process = DIFFUSION["v_prediction"]
    still, noisy = (build(f"ddim:spacing=trailing,compat=none,eta={eta}", process, steps) for eta in (0, 0.5))
    assert still.noisy == ()
    assert len(noisy.noisy) == steps - 1  # the last step ends without noise
    assert same(still, build("dpm-solver:order=1,spacing=trailing", process, steps))


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


@pytest.mark.parametrize("name", OF_FLOWS)
def test_prediction_types_describe_the_same_sampler_of_a_flow(name):
    results = []
    below_one = "/".join(f"{s:.4f}" for s in np.linspace(0.98, 0.05, 12))  # where eps says something of x0
    for prediction in ("flow_prediction", "epsilon", "sample", "v_prediction"):
        process = Process.flow(3.0, prediction=prediction)
        table = build(f"{name}{',' if ':' in name else ':'}sigmas={below_one}", process, 12)
        levels = iter(table.level.tolist())

        def network(y, t, levels=levels, prediction=prediction):
            a, b = next(levels)
            x0 = np.tanh(y + 0.1 * t / 1000)
            eps = (y - a * x0) / b
            said = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow_prediction": eps - x0}
            return said[prediction]

        results.append(sample(network, table, np.linspace(-1, 1, 5)))
    assert np.allclose(results, results[0], rtol=1e-8, atol=1e-9)


def moments_at_the_end(table, spread):
    """What is left of a difference at the start, and the variance, for data that are N(0, spread^2); no sampling."""
    folded = table.fold()
    a, b = table.level[0]
    state, covariance = np.eye(table.width)[0], np.zeros((table.width,) * 2)
    covariance[0, 0] = a**2 * spread**2 + b**2
    for i in range(len(table)):
        a, b = table.level[i]
        # the exact eps of y = a x0 + b eps
        gain = b / (a**2 * spread**2 + b**2)
        forward = folded.A[i] + np.outer(folded.B[i] * gain, table.input[i])
        covariance = forward @ covariance @ forward.T + np.outer(table.C[i], table.C[i])
        state = forward @ state
    return np.array([table.output @ state, table.output @ covariance @ table.output])


def sde(order, form, slope="midpoint", compat=None, solver=dpm_solver):
    def make(steps):
        grid = Grid(np.zeros(steps), *variance_preserving(np.geomspace(8, 0.05, steps + 1)))
        return solver(grid, order=order, form=form, slope=slope, compat=compat, lower_order_final=False)

    return make


def ddpm(steps):
    bars = 1 / (1 + np.geomspace(0.05, 8, steps + 1) ** 2)
    return ddim(steps, schedule=bars, times=range(steps, 0, -1), eta=1.0, set_alpha_to_one=False)


OF_SDES = {
    # methods of x0 keep the mean for Gaussian data, whatever the step
    "ddim eta 1": (ddpm, None, 1),
    "sde++ 1": (sde(1, "sde-data"), None, 1),
    "sde++ 2m": (sde(2, "sde-data"), None, 2),
    "sde++ 2m heun": (sde(2, "sde-data", "heun"), None, 2),
    "sde++ 3m": (sde(3, "sde-data"), None, 2),
    "sde++ 3m of diffusers": (sde(3, "sde-data", compat="diffusers"), None, 1),  # SDE_SECOND_DIFFERENCE_SIGN
    # a stage and the step behind it draw noise of their own
    "sde++ 2s": (sde(2, "sde-data", solver=dpm_singlestep), None, 1),
    "sde++ 3s": (sde(3, "sde-data", solver=dpm_singlestep), None, 1),
    "sde 1": (sde(1, "sde-noise"), 1, 1),
    "sde 2m": (sde(2, "sde-noise"), 2, 2),
    "sde 2m heun": (sde(2, "sde-noise", "heun"), 2, 2),
    "sde 3m": (sde(3, "sde-noise"), 2, 2),
}
"""How each is made, the order of the mean, or None where that is exact, and the order of the variance."""


@pytest.mark.parametrize("name", OF_SDES)
def test_moments_of_sde_solvers_converge(name):
    """Order 3 is limited to 2 by its fresh noise and by its start, which are right to second order.

    The spread of the data is one at which no leading error vanishes; at 0.8 that of the noise form of order 1 does.
    """
    make, of_mean, of_variance = OF_SDES[name]
    spread, errors = 0.25, []
    for table in (make(384), make(768)):
        (first, before), (a, b) = table.level[[0, -1]]
        variance, at_the_start = a**2 * spread**2 + b**2, first**2 * spread**2 + before**2
        # what is left of a difference: the regression of the end on the start, which the process in reverse has too
        wanted = np.array([first / a * variance / at_the_start, variance])
        errors.append(np.abs(moments_at_the_end(table, spread) - wanted))
        assert len(table.noisy) == len(table)
    of_means, of_variances = np.transpose(errors)
    assert observed(of_variances) == pytest.approx(of_variance, abs=0.1)
    if of_mean is None:
        assert of_means.max() < 1e-14
    else:
        assert observed(of_means) == pytest.approx(of_mean, abs=0.1)


def observed(errors):
    return np.log2(errors[0] / errors[1])


def test_every_defect_has_a_name_of_its_own():
    assert len({d.name for d in defects.DEFECTS}) == len(defects.DEFECTS) == 13
    assert all(d.where and d.what for d in defects.DEFECTS)
