"""Solver tables: their form, and what they do against diffusers' schedulers driven with basis vectors."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.schedule import alpha_bar, betas, ddim_times
from hasten.passes.solvers.table import SolverTable, one_latent

STEPS = [1, 2, 3, 5, 7, 10, 30, 50]
SD = {"beta_start": 0.00085, "beta_end": 0.012}


def probed(scheduler, steps: int, noisy: bool, **timesteps):
    """The response matrix of a diffusers scheduler, (M + 1, 1 + M + Z), and its timesteps."""
    import torch

    scheduler.set_timesteps(steps, **timesteps)
    times = scheduler.timesteps
    count = len(times)
    basis = torch.eye(1 + count * (2 if noisy else 1), dtype=torch.float64)
    sample, rows = basis[0], []
    for i, t in enumerate(times):
        rows.append(sample)
        extra = {"eta": noisy, "variance_noise": basis[1 + count + i]} if noisy else {}
        sample = scheduler.step(basis[1 + i], t, sample, **extra).prev_sample
    return torch.stack([*rows, sample]).numpy(), times.numpy()


def diffusers_ddim(exact: bool, **config):
    diffusers = pytest.importorskip("diffusers")
    import torch

    scheduler = diffusers.DDIMScheduler(clip_sample=False, **config)
    if exact:
        ends = {"start": config.get("beta_start", 0.0001), "end": config.get("beta_end", 0.02)}
        bars = torch.from_numpy(alpha_bar(config["beta_schedule"], **ends))
        scheduler.alphas_cumprod = bars
        scheduler.final_alpha_cumprod = torch.ones(()).double() if config.get("set_alpha_to_one", True) else bars[0]
    return scheduler


def drop_silent(matrix: np.ndarray, table: SolverTable) -> np.ndarray:
    """diffusers draws noise for every step; the table numbers only the rows that use it."""
    count = len(table)
    unused = [i for i in range(count) if i not in table.noisy]
    if matrix.shape[1] > 1 + count:
        assert np.abs(matrix[:, [1 + count + i for i in unused]]).max(initial=0) < 1e-7
        return np.delete(matrix, [1 + count + i for i in unused], axis=1)
    return matrix


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alpha_bar_equals_that_of_diffusers(schedule):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule).alphas_cumprod.numpy()
    assert relative(np.log(alpha_bar(schedule)), np.log(theirs)) < 2e-5


def test_betas_at_both_ends():
    assert betas("linear", 10)[[0, -1]] == pytest.approx([0.0001, 0.02], rel=1e-15)
    assert betas("scaled_linear", start=0.00085, end=0.012)[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-12)
    assert betas("squaredcos_cap_v2")[-1] == 0.999


def test_grids_of_five_steps():
    assert ddim_times("leading", 5, offset=1).tolist() == [801, 601, 401, 201, 1]
    assert ddim_times("trailing", 5).tolist() == [999, 799, 599, 399, 199]
    assert ddim_times("linspace", 5).tolist() == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("eta", [0, 1])
def test_ddim_equals_diffusers(prediction, spacing, offset, eta):
    config = {
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        **SD,
    }
    for steps in STEPS:
        for one in (True, False):
            wanted, times = probed(diffusers_ddim(True, set_alpha_to_one=one, **config), steps, bool(eta))
            table = ddim(
                steps,
                schedule="scaled_linear",
                prediction=prediction,
                spacing=spacing,
                offset=offset,
                eta=eta,
                set_alpha_to_one=one,
                **SD,
            )
            assert table.time.tolist() == times.tolist()
            assert relative(table.response(), drop_silent(wanted, table)) < 1e-12, (steps, one)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_equals_stock_float32_diffusers(schedule):
    config = {"beta_schedule": schedule, "prediction_type": "v_prediction"}
    wanted, _ = probed(diffusers_ddim(False, **config), 20, False)
    assert relative(ddim(20, schedule=schedule, prediction="v_prediction").response(), wanted) < 2e-5


def test_ddim_steps_to_the_next_time_of_the_grid_without_compat():
    bars = alpha_bar("linear")
    table = ddim(10, schedule="linear", spacing="linspace", compat=None)
    clean = 0.7  # a network that knows x0 exactly must be taken along y = a x0 + b eps through every time of the grid
    state, eps = np.array([np.sqrt(bars[999]) * clean + np.sqrt(1 - bars[999]) * 0.3]), 0.3
    folded = table.fold()
    for i, t in enumerate(table.time.astype(int)):
        assert state[0] == pytest.approx(np.sqrt(bars[t]) * clean + np.sqrt(1 - bars[t]) * eps, rel=1e-12)
        state = folded.A[i] @ state + folded.B[i] * eps
    assert state[0] == pytest.approx(clean, rel=1e-12)
    compat = ddim(10, schedule="linear", spacing="linspace")
    assert relative(compat.response(), table.response()) > 1e-3


def test_prediction_types_describe_the_same_sampler():
    def run(prediction):
        table, x, bars = ddim(12, prediction=prediction), 0.4, alpha_bar("scaled_linear")
        folded = table.fold()
        for i, t in enumerate(table.time.astype(int)):
            a, b = np.sqrt(bars[t]), np.sqrt(1 - bars[t])
            eps = np.tanh(x + 0.1 * i)
            x0 = (x - b * eps) / a
            f = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[prediction]
            x = folded.A[i, 0, 0] * x + folded.B[i, 0] * f
        return x

    assert run("sample") == pytest.approx(run("epsilon"), rel=1e-9)
    assert run("v_prediction") == pytest.approx(run("epsilon"), rel=1e-9)


def diffusers_flow(steps, shift, sigmas=None):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    extra = {} if sigmas is None else {"sigmas": sigmas}
    return probed(scheduler, steps, False, **extra)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_flow_euler_equals_diffusers(steps, shift):
    wanted, times = diffusers_flow(steps, shift)
    table = flow_euler(steps, shift=shift)
    assert relative(table.time, times) < 2e-6
    assert (
        relative(table.response(), wanted) < 2e-6
    )  # the scheduler keeps float32 sigmas and casts the sample to float32


def test_flow_euler_equals_diffusers_with_given_sigmas():
    sigmas = np.linspace(1, 1 / 8, 8)
    wanted, times = diffusers_flow(8, 3.16, sigmas)
    table = flow_euler(8, shift=3.16, sigmas=sigmas.tolist())
    assert relative(table.time, times) < 2e-6
    assert relative(table.response(), wanted) < 2e-6


def test_flow_euler_shifts_once_without_compat():
    assert flow_euler(5, shift=3.0, compat=None).time / 1000 == pytest.approx(
        [1, 0.90012, 0.75037, 0.50099, 0.002994], rel=1e-4
    )
    assert flow_euler(5, shift=3.0).time / 1000 == pytest.approx([1, 0.90036, 0.75112, 0.50299, 0.00893], rel=1e-3)
    assert np.array_equal(flow_euler(5).response(), flow_euler(5, compat=None).response())


def test_a_network_that_knows_the_answer_ends_there():
    table = flow_euler(7, shift=2.0).fold()
    x, clean, eps = 0.3, -0.8, 0.3
    for i in range(7):
        x = table.A[i, 0, 0] * x + table.B[i, 0] * (eps - clean)
    assert x == pytest.approx(clean, rel=1e-13)


def test_response_is_strictly_lower_triangular():
    matrix = ddim(6, eta=1.0).response()
    assert np.array_equal(matrix[:, 1:7], np.tril(matrix[:, 1:7], -1))


def test_folding_changes_nothing_but_the_spelling():
    table = ddim(9, schedule="squaredcos_cap_v2", prediction="v_prediction", eta=0.5)
    folded = table.fold()
    assert not folded.cy.any()
    assert (folded.cf == 1).all()
    assert relative(folded.response(), table.response()) < 1e-15


def test_two_latents_compute_adams_bashforth():
    # x_{i+1} = x_i + 3/2 f_i - 1/2 f_{i-1}: the first latent is x, the second the previous output
    rows = 3
    table = SolverTable(
        time=np.arange(rows),
        input=np.tile([1.0, 0.0], (rows, 1)),
        A=np.tile([[1.0, -0.5], [0.0, 0.0]], (rows, 1, 1)),
        B=np.tile([1.5, 1.0], (rows, 1)),
        C=np.zeros((rows, 2)),
        cy=np.zeros(rows),
        cf=np.ones(rows),
        output=np.array([1.0, 0.0]),
    )
    assert table.response()[-1].tolist() == [1.0, 1.0, 1.0, 1.5]


def test_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        ddim(3).A[0] = 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: alpha_bar("scaled_liner"),
            "unknown noise schedule 'scaled_liner'; there are linear, scaled_linear, squaredcos_cap_v2. "
            "Did you mean 'scaled_linear'?",
        ),
        (
            lambda: ddim(5, spacing="trail"),
            "unknown spacing 'trail'; there are leading, trailing, linspace. Did you mean 'trailing'?",
        ),
        (
            lambda: ddim(5, prediction="v"),
            "unknown prediction type 'v'; there are epsilon, sample, v_prediction, flow_prediction.",
        ),
        (lambda: ddim(0), "0 sampling steps were asked for; the schedule has times for 1 to 1000"),
        (lambda: ddim(1001), "1001 sampling steps were asked for; the schedule has times for 1 to 1000"),
        (
            lambda: ddim(1000, offset=1),
            "the leading grid of 1000 steps with offset 1 starts at 1000, past the last training time 999; "
            "lower the offset",
        ),
        (lambda: ddim(5, eta=-1), "ddim: eta is -1; it scales a standard deviation and cannot be negative"),
        (lambda: ddim(5, eta=9), "ddim: eta 9 asks for more noise than a step may add on this grid; lower eta"),
        (lambda: ddim(5, compat="sd"), "ddim: compat is 'diffusers' or None, not 'sd'"),
        (
            lambda: ddim(5, schedule=np.linspace(0.99, 0, 1000), spacing="trailing"),
            "epsilon prediction says nothing where the signal level is zero; use v_prediction or sample",
        ),
        (lambda: flow_euler(0), "flow-euler: 0 sampling steps were asked for; at least 1 is needed"),
        (lambda: flow_euler(3, shift=0), "flow-euler: shift is 0; it must be positive (1 leaves the grid as it is)"),
        (
            lambda: flow_euler(3, sigmas=[1, 0.5]),
            "flow-euler: 3 steps were asked for with 2 sigmas; give one sigma a step",
        ),
        (
            lambda: flow_euler(2, sigmas=[0.5, 1]),
            "flow-euler: sigmas must descend, from at most 1 to more than 0 (the final 0 is added)",
        ),
        (
            lambda: one_latent(time=[1, 2], a=1, b=np.inf, c=0, cy=[0, 0], cf=[1, 1]),
            "solver table: B has a value that is not finite; no sampler can run it",
        ),
        (
            lambda: one_latent(time=[1, 2], a=1, b=1, c=0, cy=[0], cf=[1, 1]),
            "solver table: cy has shape (1,), but 2 evaluations over 1 latents need (2,)",
        ),
    ],
)
def test_message_says_what_is_wrong(build, message):
    with pytest.raises(UsageError) as caught:
        build()
    assert str(caught.value) == message
