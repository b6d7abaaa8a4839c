"""Picard sampling: the plain loop's result in fewer calls."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.hooks import Clip
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.picard_gain import predicted_gain
from hasten.passes.solvers.picard_loop import allowed_changes, settled, slide
from hasten.passes.solvers.picard_rows import transport, unit_change
from hasten.passes.solvers.picard_window import changes, padded, rows_from, seen_by_network, swept
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.table import one_latent

DDIM = "ddim:spacing=trailing,compat=none"
SOLVERS = [
    DDIM,
    "ddim:eta=1",
    "flow-euler:shift=2",
    "flow-heun",
    "dpm++2m",
    "dpm++2m-sde",
    "unipc:order=3",
    "deis:order=3",
    "pndm",
]


def table_of(solver, steps):
    return build(solver, Process.flow() if solver.startswith("flow") else Process.diffusion(), steps)


def perfect(mixture, table, solver=DDIM):
    """The mixture's network, called with any rows at once."""
    levels = dict(zip(table.time.tolist(), table.level.tolist(), strict=False))
    prediction = "flow_prediction" if solver.startswith("flow") else "epsilon"

    def denoise(y, t):
        t = np.broadcast_to(t, len(y))
        said = np.empty_like(y)
        for time in set(t.tolist()):
            said[t == time] = mixture.answer(prediction, y[t == time], *levels[time])
        return said

    return denoise


def draws(table, shape):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for _ in table.noisy]


def published(mixture, table, window, tolerance):
    """Run ParaDiGMS as published on a one-step table: the result, the sweeps and the evaluations."""
    steps, folded, level = len(table), table.fold(), table.level
    variance = np.zeros(steps + 1)
    for i, ((a, b), (next_a, next_b)) in enumerate(pairwise(level)):
        variance[i] = next_b**2 / b**2 * (1 - (a / next_a) ** 2)
    states = np.tile(mixture.noise, (steps + 1, 1, 1))
    begin = sweeps = evaluations = 0
    while begin < steps:
        end = min(begin + window, steps)
        drift = [
            (folded.A[i] - 1) * states[i] + folded.B[i] * mixture.answer("epsilon", states[i], *level[i])
            for i in range(begin, end)
        ]
        new = states[begin] + np.cumsum(drift, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = ((new - states[begin + 1 : end + 1]) ** 2).mean(-1) / variance[begin + 1 : end + 1, None]
        failed = [*(error > tolerance**2).any(1), True]
        states[begin + 1 : end + 1], states[end + 1 :] = new, new[-1]
        begin += min(1 + failed.index(True), window)
        sweeps, evaluations = sweeps + 1, evaluations + len(drift)
    return states[-1], sweeps, evaluations


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("solver", SOLVERS)
def test_tolerance_zero_is_the_plain_loop(mixture, solver, window):
    table = table_of(solver, 12)
    denoise, noise = perfect(mixture, table, solver), draws(table, mixture.noise.shape)
    got = picard(denoise, table, mixture.noise, window=window, tolerance=0, noise=noise)
    assert np.array_equal(got.result, sample(denoise, table, mixture.noise, noise=noise))
    assert got.sweeps <= len(table)
    assert got.critical == got.sweeps
    if window == 1:
        assert got.sweeps == got.evaluations == len(table)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tolerance_saves_sweeps_and_hardly_changes_the_result(mixture, solver):
    table = table_of(solver, 30)
    denoise, noise = perfect(mixture, table, solver), draws(table, mixture.noise.shape)
    got = picard(denoise, table, mixture.noise, window=30, tolerance=0.1, noise=noise)
    exact = sample(denoise, table, mixture.noise, noise=noise)
    assert got.sweeps < len(table) / (1.5 if table.noisy else 3)
    assert abs(got.result - exact).max() < 2e-2
    closer = picard(denoise, table, mixture.noise, window=30, tolerance=0.001, noise=noise)
    assert closer.sweeps > got.sweeps
    assert abs(closer.result - exact).max() < 2e-4


# Sweeps and evaluations a row that ParaDiGMS as published was found to take on this mixture. Evaluations are those from
# the third start: the others take up to 0.2 more, and all four, which settle when the slowest does, up to 0.25 more,
# here as in `published`.
@pytest.mark.parametrize(
    ("steps", "window", "sweeps", "share"),
    [(20, 20, 5, 2.1), (50, 32, 6, 1.9), (200, 128, 7, 2.1), (1000, 128, 16, 1.8)],
)
def test_sweeps_and_evaluations_on_the_mixture(mixture, steps, window, sweeps, share):
    table = table_of(DDIM, steps)
    got = picard(perfect(mixture, table), table, mixture.noise, window=window, tolerance=0.1)
    assert got.sweeps <= sweeps
    one = picard(perfect(mixture, table), table, mixture.noise[2:3], window=window, tolerance=0.1)
    assert one.sweeps <= sweeps
    assert round(one.evaluations / steps, 1) <= share
    exact = mixture.solve(table)[-1]
    assert abs(one.result - exact[2:3]).max() < 3e-3


@pytest.mark.parametrize(("steps", "window"), [(20, 20), (50, 32), (200, 128), (300, 16)])
def test_it_is_paradigms_less_the_sweep_for_the_last_row(mixture, steps, window):
    table = table_of(DDIM, steps)
    got = picard(perfect(mixture, table), table, mixture.noise, window=window, tolerance=0.1)
    result, sweeps, evaluations = published(mixture, table, window, 0.1)
    assert (got.sweeps, got.evaluations) == (sweeps - 1, evaluations - 1)
    assert abs(got.result - result).max() < 1e-2


def wavy(y, t):
    t = t.reshape(-1, *(1,) * (y.ndim - 1)) if hasattr(t, "reshape") else t
    return y * (0.3 + 2e-4 * t) + 0.1 * y * y


@pytest.mark.parametrize("solver", ["flow-euler", "dpm++2m", "unipc"])
def test_numpy_and_torch_agree(solver):
    table, x = table_of(solver, 10), np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    from_numpy = picard(wavy, table, x, window=4, tolerance=0.1)
    from_torch = picard(wavy, table, torch.from_numpy(x), window=4, tolerance=0.1)
    assert from_numpy.result.dtype == np.float32
    assert from_torch.result.dtype == torch.float32
    assert from_torch[1:] == from_numpy[1:]
    np.testing.assert_allclose(from_torch.result.numpy(), from_numpy.result, rtol=1e-5, atol=1e-5)
    x = torch.from_numpy(x).double()
    exact = picard(wavy, table, x, window=4, tolerance=0).result
    torch.testing.assert_close(exact, sample(wavy, table, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "limits", "kept"),
    [
        ([[0.0, 0.1], [0.2, 0.0], [9.0, 9.0]], [0.1, 0.2, np.inf], 3),  # the window's last may change as it likes
        ([[0.0, 0.1], [0.2, 0.3], [0.0, 0.0]], [0.1, 0.2, np.inf], 2),  # the first that did not settle is kept
        ([[0.2, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.1, 0.2, np.inf], 1),
        ([[0.1, 0.1], [np.nan, 0.0], [0.0, 0.0]], [0.1, 0.2, np.inf], 1),  # unless it is no number
        ([[np.nan, 0.0], [0.0, 0.0]], [0.1, np.inf], 1),  # whose first is what the plain loop has too
        ([[9.0, 9.0]], [np.inf], 1),
    ],
)
def test_what_has_settled(sizes, limits, kept):
    assert settled(np.array(sizes), limits) == kept


@pytest.mark.parametrize("tolerance", [0, 0.1])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_compiled_windows_arithmetic_is_that_of_the_sweeps(solver, tolerance):
    """Here in numpy, in a window with room for one latent more, whose last rows are behind the table's end."""
    table, window, x = table_of(solver, 12), 5, np.linspace(-0.5, 0.5, 12, dtype=np.float32).reshape(2, 6)
    draws = np.random.default_rng(0).normal(size=(len(table.noisy), 2, 6)).astype(np.float32)
    rows, noise = padded(table, window, table.width + 1), np.zeros((len(table) + window, 2, 6), np.float32)
    noise[list(table.noisy)] = draws

    def sweep(span, states):
        here, held = rows_from(rows, span.start, window), np.stack([*states, *states[-1:] * 5])[: window + 1]
        seen = seen_by_network(here, held)
        said = wavy(seen[:-1].reshape(-1, 6), np.repeat(here.time, 2)[:, None]).reshape(seen[:-1].shape)
        found = np.stack(swept(here, held, said, noise[span.start :][:window]))
        for behind in found[len(span) :]:
            np.testing.assert_allclose(behind, found[len(span) - 1], rtol=1e-5, atol=1e-6)
        mean_squares, absolutes = changes(here, held, seen, found)
        return list(found[: len(span)]), (mean_squares if tolerance else absolutes)[: len(span)], 1

    first = np.stack([x * np.float32(table.init), *[x * 0] * table.width])
    got = slide(sweep, table, first, window, allowed_changes(table, x, window, tolerance, None), 0)
    expected = picard(wavy_rows, table, x, window=window, tolerance=tolerance, noise=draws)
    assert got.result.dtype == np.float32
    np.testing.assert_allclose(got.result, expected.result, rtol=2e-5, atol=2e-5)
    if tolerance:  # at 0 the last bit decides
        assert got[1:] == expected[1:]


def wavy_rows(y, t):
    return wavy(y, t[:, None])


def test_the_network_sees_every_row_of_every_sample_with_its_own_time():
    table, x, calls = table_of("dpm++2m", 7), torch.full((2, 3, 4), 0.1, dtype=torch.bfloat16), []

    def denoise(y, t):
        calls.append((y, t))
        return y * 0

    got = picard(denoise, table, x, window=4, tolerance=0)
    y, t = calls[0]
    assert y.shape == (8, 3, 4)
    assert y.dtype == torch.bfloat16
    assert t.dtype == torch.float32  # bfloat16 has no 999
    assert t.tolist() == pytest.approx([time for time in table.time[:4] for _ in x])
    assert got.result.dtype == torch.float32
    assert got.sweeps == len(calls)
    assert got.evaluations == sum(len(t) for _, t in calls) / len(x)


def test_several_networks_and_a_second_input():
    table, x = build("caf", Process.flow(), 8), np.linspace(-1, 1, 6).reshape(3, 2)
    networks = [lambda y, t: 0.5 - y, lambda y, t, velocity: y * 0.2 - velocity * 0.3]
    got = picard(networks, table, x, window=4, tolerance=0)
    assert np.array_equal(got.result, sample(networks, table, x))
    assert got.critical == got.sweeps + 1  # the first window has rows of both


def test_a_hook_acts_in_every_sweep(mixture):
    table = table_of("dpm++2m", 12)
    denoise = perfect(mixture, table)
    got = picard(denoise, table, mixture.noise, window=6, tolerance=0, hook=Clip(0.4))
    assert np.array_equal(got.result, sample(denoise, table, mixture.noise, hook=Clip(0.4)))
    assert abs(got.result).max() <= 0.4


@pytest.mark.parametrize("tolerance", [0, 0.1])
def test_not_a_number_never_settles_and_does_not_last(mixture, tolerance):
    table, first = table_of("dpm++2m", 12), True
    denoise = perfect(mixture, table)

    def fails_once(y, t):
        nonlocal first
        said = denoise(y, t)
        if first:
            said[4 * len(mixture.noise) :] = np.nan  # from the fifth row on
        first = False
        return said

    got = picard(fails_once, table, mixture.noise, window=12, tolerance=tolerance)
    assert abs(got.result - sample(denoise, table, mixture.noise)).max() <= (2e-2 if tolerance else 0)
    broken = picard(lambda y, t: y * np.nan, table, mixture.noise, window=12, tolerance=tolerance)
    assert np.isnan(broken.result).all()
    assert broken.sweeps <= len(table)


@pytest.mark.parametrize("solver", [DDIM, "euler", "ddim:eta=1", "dpm++2m", "unipc:order=3", "flow-euler", "heun"])
def test_a_change_of_what_the_network_sees_travels_unchanged(solver):
    table = table_of(solver, 9)
    change, seen = np.eye(table.width)[0], []
    for row, moved in zip(table.input, transport(table), strict=True):
        seen.append(row @ change)
        change = moved @ change
    np.testing.assert_allclose([*seen, table.output @ change], 1, rtol=1e-9)


def test_errors_are_measured_by_the_posteriors_variance():
    table = table_of(DDIM, 9)
    kicks = table_of("ddim:spacing=trailing,compat=none,eta=1", 9).C[:, 0]
    np.testing.assert_allclose(unit_change(table), [*kicks[:-1] ** 2, kicks[-2] ** 2], rtol=1e-9)
    stages = unit_change(table_of("heun", 9))  # both stages of a step end at the same level
    assert (stages > 0).all()


def bare():
    return one_latent(time=[2.0, 1.0], a=1.0, b=-0.5, c=0.0, cy=np.zeros(2), cf=np.ones(2))


def test_a_unit_serves_a_table_without_levels():
    x = np.ones((1, 2))
    got = picard(lambda y, t: y, bare(), x, window=2, tolerance=0.1, unit=[1.0, 1.0])
    assert np.allclose(got.result, 0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "the window is 0; it holds at least 1 row"),
        ({"tolerance": -0.1}, "the tolerance is -0.1; it is positive"),
        ({"tolerance": float("nan")}, "the tolerance is nan; it is positive"),
        ({"tolerance": float("inf")}, "the tolerance is inf; it is positive"),
        ({"x": np.float64(1.0)}, r"x has shape \(\); its first axis counts the samples"),
        ({"x": np.ones((0, 2))}, r"x has shape \(0, 2\); its first axis counts the samples"),
        ({"table": bare()}, "no noise levels to measure errors by; pass unit="),
        ({"unit": [1.0]}, r"unit has shape \(1,\); it holds 3 variances"),
        ({"unit": [1.0, 0.0, 1.0]}, "it holds 3 variances, one a row, all positive"),
        ({"noise": [np.ones((1, 2))]}, "adds noise in 0 of 3 rows; 1 noise arrays were given"),
        ({"denoise": [wavy, wavy]}, "evaluates 1 networks; 2 were given"),
        ({"denoise": lambda y, t: y[:1]}, r"given 2 rows as \(2, 2\) and answered \(1, 2\)"),
    ],
)
def test_refusals(given, message):
    call = {"denoise": wavy, "table": table_of(DDIM, 3), "x": np.ones((1, 2)), "window": 2, "tolerance": 0.1, **given}
    with pytest.raises(UsageError, match=message):
        picard(call.pop("denoise"), call.pop("table"), call.pop("x"), **call)


def test_predicted_gain():
    table = table_of(DDIM, 50)
    gain = predicted_gain({1: 0.1, 16: 0.2, 48: 0.4}, table, 32, 6)
    assert (gain.plain, gain.picard) == (pytest.approx(5.0), pytest.approx(1.8))
    assert gain.pays
    assert str(gain) == "1.8 s instead of 5 s, 2.78 times as fast"
    loss = {1: 0.1, 64: 6.4}
    with pytest.raises(UsageError, match=r"6 sweeps over 32 rows take 6 x 3\.2 s .* 50 x 0\.1 s, so .* 0\.26 times"):
        predicted_gain(loss, table, 32, 6)
    forced = predicted_gain(loss, table, 32, 6, force=True)
    assert not forced.pays
    assert forced.factor == pytest.approx(5 / 19.2)
    assert predicted_gain({1: 1.0, 50: 2.0}, table, 999, 5).picard == pytest.approx(10)  # no window exceeds the table


@pytest.mark.parametrize(
    ("seconds", "window", "sweeps", "message"),
    [
        ({1: 0.1, 16: 0.2}, 32, 6, "measured on 1, 16 rows; 1 row and at least 32 rows"),
        ({32: 0.1}, 32, 6, "measured on 32 rows; 1 row and"),
        ({}, 32, 6, "measured on no rows"),
        ({1: 0.1, 32: 0.0}, 32, 6, "a call on 32 rows was measured at 0 s; both must be positive"),
        ({1: 0.1}, 0, 6, "6 sweeps over 0 rows are no run"),
        ({1: 0.1}, 1, 0, "0 sweeps over 1 rows are no run"),
    ],
)
def test_refusals_of_a_prediction(seconds, window, sweeps, message):
    with pytest.raises(UsageError, match=message):
        predicted_gain(seconds, table_of(DDIM, 50), window, sweeps)


def test_no_torch_is_needed():
    code = (
        "import sys, numpy as np; from hasten.passes.solvers.picard import picard; "
        "from hasten.passes.solvers.ddim import ddim; "
        "picard(lambda y, t: y, ddim(4), np.ones((1, 2)), window=2, tolerance=0.1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("solver", SOLVERS)
def test_accelerated_tolerance_zero_is_the_plain_loop(mixture, solver, window):
    table = table_of(solver, 12)
    denoise, noise = perfect(mixture, table, solver), draws(table, mixture.noise.shape)
    got = picard(denoise, table, mixture.noise, window=window, tolerance=0, noise=noise, acceleration=3)
    assert np.array_equal(got.result, sample(denoise, table, mixture.noise, noise=noise))
    assert got.sweeps <= len(table)


# Sweeps of plain Picard and with two earlier sweeps, tolerance 1e-3. The plain guesses know how a change travels along
# the table, which leaves little to an ODE's window and a third to that of a stochastic solver.
@pytest.mark.parametrize(
    ("solver", "steps", "window", "plain", "accelerated"),
    [
        (DDIM, 50, 50, 9, 7),
        (DDIM, 200, 128, 11, 9),
        ("dpm++2m", 200, 128, 12, 11),
        ("unipc:order=3", 200, 128, 12, 10),
        ("ddim:eta=1", 50, 32, 18, 14),
        ("ddim:eta=1", 200, 128, 22, 14),
    ],
)
def test_sweeps_with_acceleration(mixture, solver, steps, window, plain, accelerated):
    table = table_of(solver, steps)
    denoise, noise = perfect(mixture, table, solver), draws(table, mixture.noise.shape)
    options = {"window": window, "tolerance": 1e-3, "noise": noise}
    exact = sample(denoise, table, mixture.noise, noise=noise)
    without = picard(denoise, table, mixture.noise, **options)
    found = picard(denoise, table, mixture.noise, **options, acceleration=2)
    assert (without.sweeps, found.sweeps) == (plain, accelerated)
    assert abs(found.result - exact).max() < 2e-4


def test_acceleration_is_the_same_in_torch():
    table = build(DDIM, Process.diffusion(), 12)
    x = np.random.default_rng(1).normal(size=(3, 2, 4))
    options = {"window": 6, "tolerance": 1e-3, "acceleration": 2}
    got = picard(wavy, table, torch.from_numpy(x), **options)
    wanted = picard(wavy, table, x, **options)
    np.testing.assert_allclose(got.result.numpy(), wanted.result, rtol=1e-9, atol=1e-9)
    assert got[1:] == wanted[1:]


def test_a_sample_is_accelerated_by_itself(mixture):
    table = table_of("ddim:eta=1", 30)
    denoise, noise = perfect(mixture, table), draws(table, mixture.noise.shape)
    together = picard(denoise, table, mixture.noise, window=30, tolerance=0, noise=noise, acceleration=2)
    alone = picard(
        denoise, table, mixture.noise[:1], window=30, tolerance=0, noise=[z[:1] for z in noise], acceleration=2
    )
    np.testing.assert_allclose(together.result[:1], alone.result, rtol=1e-12, atol=1e-12)


def test_not_a_number_does_not_spread_by_acceleration():
    table, asked = build(DDIM, Process.diffusion(), 8), []

    def denoise(y, t):
        asked.append(len(y))
        said = np.sin(y)
        if len(asked) in (2, 3):
            said[-1] = np.nan
        return said

    got = picard(denoise, table, np.ones((1, 2)), window=8, tolerance=0, acceleration=2)
    assert np.array_equal(got.result, sample(lambda y, t: np.sin(y), table, np.ones((1, 2))))
