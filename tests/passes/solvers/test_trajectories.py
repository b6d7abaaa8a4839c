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

GOLDEN = json.loads((Path(__file__).parent / "trajectories.json").read_text())
RUNS = [(name, int(steps)) for name, case in GOLDEN["cases"].items() for steps in case["runs"]]


def table_of(name, steps):
    """The table that the case's configuration asks for, and its hook."""
    case = GOLDEN["cases"][name]
    read = read_config({"_class_name": case["scheduler"], **case["config"]})
    given = dict(case["step"])
    if case["sigmas"]:
        given["sigmas"] = np.linspace(1, 1 / steps, steps).tolist()
    return read.request.with_options(**given).build(read.process, steps), read.hook


@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_every_state_is_that_of_diffusers(mixture, name, steps):
    case = GOLDEN["cases"][name]
    run = case["runs"][str(steps)]
    table, hook = table_of(name, steps)
    levels, states = iter(run["signal_noise"]), [mixture.noise * table.init]
    sample(
        lambda y, t: mixture.answer(case["prediction"], y, *next(levels)),
        table,
        mixture.noise,
        noise=np.array(GOLDEN["noise"])[: len(table.noisy)],
        hook=hook,
        callback=lambda i, t, x: states.append(x),
    )
    wanted = np.array(run["trajectory"])
    if case["space"] == "ve":  # the scheduler keeps x / a; the end has no noise
        wanted *= np.append(np.array(run["signal_noise"])[:, 0], 1)[:, None, None]
    assert np.allclose(table.time, run["times"], rtol=1e-11)
    assert np.allclose(states, wanted, rtol=0, atol=1e-10)
    assert np.allclose(table.level[:-1], run["signal_noise"], atol=1e-11)


def test_what_has_no_trajectory_is_refused_by_name():
    missing = [name for name, case in GOLDEN["cases"].items() if not case["runs"]]
    assert missing == ["unipc_bh1_2", "unipc_bh1_3"]
    for name in missing:
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
