"""Every state of diffusers' schedulers on a problem with a closed-form network, without diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.splitting import DENOISER, GUIDE, ltsp, stsp

FOLDER = Path(__file__).parent
GOLDEN = json.loads((FOLDER / "trajectories.json").read_text())
RUNS = [(name, int(steps)) for name, case in GOLDEN["cases"].items() for steps in case["runs"]]
NOT_A_NUMBER = ("unipc_bh1_2", "unipc_bh1_3")
"""Cases whose last state is none; `defects.BH1_ZERO_END`."""


@pytest.fixture(scope="module")
def reference():
    """(name, steps) -> states (M + 1, 4, 2), levels (M, 2) and times (M,); and the draws (D, 4, 2)."""
    with np.load(FOLDER / "trajectories.npz") as stored:
        whole = {name: stored[name] for name in stored.files}
    found, first = {}, 0
    for at, (name, steps) in enumerate(RUNS):
        count = GOLDEN["cases"][name]["runs"][str(steps)]
        rows = slice(first, first + count)
        found[name, steps] = whole["states"][first + at :][: count + 1], whole["levels"][rows], whole["times"][rows]
        first += count
    assert (first, first + len(RUNS)) == (len(whole["times"]), len(whole["states"]))
    return found, whole["noise"]


def table_of(name, steps, **options):
    """The table that the case's configuration asks for, and its hook."""
    case = GOLDEN["cases"][name]
    read = read_config({"_class_name": case["scheduler"], **case["config"]})
    given = dict(case["step"]) | options
    if case["sigmas"]:
        given["sigmas"] = np.linspace(1, 1 / steps, steps).tolist()
    return read.request.with_options(**given).build(read.process, steps), read.hook


@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_every_state_is_that_of_diffusers(mixture, reference, name, steps):
    case = GOLDEN["cases"][name]
    wanted, levels, times = reference[0][name, steps]
    table, hook = table_of(name, steps, **({"compat": "none"} if name in NOT_A_NUMBER else {}))
    visited, states = iter(levels), [mixture.noise * table.init]
    sample(
        lambda y, t: mixture.answer(case["prediction"], y, *next(visited)),
        table,
        mixture.noise,
        noise=reference[1][: len(table.noisy)],
        hook=hook,
        callback=lambda i, t, x: states.append(x),
    )
    if case["space"] == "ve":  # the scheduler keeps x / a; the end has no noise
        wanted = wanted * np.append(levels[:, 0], 1)[:, None, None]
    if name in NOT_A_NUMBER:
        assert np.isnan(wanted[-1]).all()
        wanted, states = wanted[:-1], states[:-1]
    assert np.allclose(table.time, times, rtol=1e-11)
    assert np.allclose(states, wanted, rtol=0, atol=1e-10)
    assert np.allclose(table.level[:-1], levels, atol=1e-11)


def test_every_case_is_there_at_every_number_of_steps():
    assert len(GOLDEN["cases"]) == 46
    assert {tuple(case["runs"]) for case in GOLDEN["cases"].values()} == {("5", "10", "20", "50")}
    drawing = [name for name in GOLDEN["cases"] if table_of(name, 50, compat="none")[0].noisy]
    assert drawing == [
        *("ddim_eta1", "sde_dpmpp_1", "sde_dpmpp_2m", "sde_dpmpp_3m", "sde_dpm_2m", "sde_dpmpp_2s"),
        *("euler_ancestral", "flow_euler_stochastic"),
    ]


@pytest.mark.parametrize("name", NOT_A_NUMBER)
def test_what_is_not_a_number_in_diffusers_is_refused_by_name(name):
    with pytest.raises(UsageError, match="bh1 gives NaN in diffusers where the end has no noise"):
        table_of(name, 5)
    assert defects.BH1_ZERO_END in defects.DEFECTS


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", GOLDEN["splitting"]["ends"])
def test_splitting_ends_where_the_reference_does(mixture, name, steps):
    given = GOLDEN["splitting"]
    ratios = np.exp(np.linspace(*np.log(given["interval"]), steps + 1))
    signal, noise = variance_preserving(ratios)
    grid = Grid(np.arange(steps, 0, -1), signal, noise)
    solver = {"l": ltsp, "s": stsp}[name[0]]
    table = solver(grid, order=int(name[-1]), weight=given["weight"])
    counts = [int((table.network == n).sum()) for n in (DENOISER, GUIDE)]
    assert counts == [steps, steps * (2 if solver is stsp else 1)]
    levels = iter(table.level.tolist())
    networks = [
        lambda y, t: mixture.answer("epsilon", y, *next(levels)),
        lambda y, t: mixture.guide(y, *next(levels), given["component"]),
    ]
    end = sample(networks, table, mixture.noise)
    assert np.allclose(end / signal[-1], given["ends"][name][str(steps)], rtol=0, atol=1e-9)
