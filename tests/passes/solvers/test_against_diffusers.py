"""Response matrices equal those of diffusers' schedulers, in float64 and as they are."""

from __future__ import annotations

import logging
from collections import defaultdict

import numpy as np
import pytest
import solvers as table
import torch

from hasten.passes.solvers.dpm_solver import dpm_solver
from hasten.passes.solvers.grid import Grid
from hasten.passes.solvers.unipc import unipc

pytest.importorskip("diffusers")

CASES = defaultdict(list)
for _case in table.cases():
    if table.runnable(_case):
        CASES[_case.scheduler].append(_case)


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("scheduler", CASES)
def test_every_configuration_has_the_response_matrix_of_diffusers(scheduler):
    rows = [table.measure(case) for case in CASES[scheduler]]
    assert [table.line(row) for row in rows if not table.stands(row)] == []
    compared, refused = sum(r.compared for r in rows), sum(len(r.refused) for r in rows)
    assert compared + refused == sum(len(case.steps) for case in CASES[scheduler])
    assert compared > refused


@pytest.mark.parametrize("scheduler", CASES)
def test_stock_float32_schedulers_differ_by_their_rounding(scheduler):
    few = [table.Case(c.scheduler, c.config, (5, 20)) for c in CASES[scheduler][::4]]
    rows = [table.measure(case, stock=True) for case in few]
    assert [table.line(row) for row in rows if not table.stands(row)] == []


def everywhere(case: table.Case) -> table.Case:
    """The case at every number of steps."""
    return table.Case(case.scheduler, case.config, table.STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", CASES)
def test_every_configuration_at_every_number_of_steps(scheduler):
    rows = [table.measure(everywhere(case)) for case in CASES[scheduler]]
    assert [table.line(row) for row in rows if not table.stands(row)] == []
    compared, refused = sum(r.compared for r in rows), sum(len(r.refused) for r in rows)
    assert compared + refused == len(table.STEPS) * len(CASES[scheduler])
    assert compared > refused


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LOST_LEVELS = {
    # 1 - alpha_bar beside 1: the least level, of which the others are made, is 3e-4 off
    "DPMSolverMultistepScheduler": [({"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True}, 4)],
    # 1 - 0.999999, the first signal level, is 1.3 % off, and next to long steps it weighs
    "UniPCMultistepScheduler": [
        ({**FLOW, "flow_shift": shift, "shift_terminal": 0.05}, n) for shift in (1.0, 3.0) for n in (3, 4)
    ],
}
"""Where levels made in float32 cost more than 2e-5, though the steps between them do not."""


def on_levels_of_its_own(scheduler, config, steps):
    """The difference between a stock scheduler and our solver on the levels that it has made in float32."""
    import diffusers

    made = getattr(diffusers, scheduler)(**config)
    made.set_timesteps(steps)
    signal, noise = np.array([[float(v) for v in made._sigma_to_alpha_sigma_t(s)] for s in made.sigmas]).T
    path = "flow" if made.config.use_flow_sigmas else "diffusion"
    solver = {"DPMSolverMultistepScheduler": dpm_solver, "UniPCMultistepScheduler": unipc}[scheduler]
    grid = Grid(made.timesteps.double().numpy(), signal, noise, path=path)
    ours = solver(grid, prediction=made.config.prediction_type)
    theirs, _ = table.probed(scheduler, config, steps, stock=True)
    return table.difference(ours.response(), table.without_unused_noise(theirs, ours))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", CASES)
def test_stock_float32_schedulers_differ_by_their_rounding_everywhere(scheduler):
    failed = []
    for case in CASES[scheduler]:
        for steps in table.STEPS:
            row = table.measure(table.Case(scheduler, case.config, (steps,)), stock=True)
            if table.stands(row):
                continue
            lost = (case.config, steps) in LOST_LEVELS.get(scheduler, [])
            if not lost or on_levels_of_its_own(scheduler, case.config, steps) > 1e-6:
                failed.append(table.line(row))
    assert failed == []


def test_a_wrong_coefficient_is_seen(monkeypatch):
    from hasten.passes.solvers import unipc

    right = unipc.gains

    def wrong(*arguments, **options):
        return right(*arguments, **options) * (1 + 1e-11)

    monkeypatch.setattr(unipc, "gains", wrong)
    row = table.measure(table.Case("UniPCMultistepScheduler", table.STABLE_DIFFUSION, (5,)))
    assert len(row.different) == 1


def test_a_refusal_of_ours_alone_is_seen(monkeypatch):
    from hasten.errors import UsageError

    def refuse(config):
        raise UsageError("no")

    monkeypatch.setattr(table, "read_config", refuse)
    row = table.measure(table.Case("UniPCMultistepScheduler", {}, (5,)))
    assert row.refused == {5: [None, "no"]}
    assert not table.stands(row)


def test_the_probe_leaves_the_scheduler_modules_as_they_were():
    import diffusers.schedulers.scheduling_euler_ancestral_discrete as module

    before = dict(vars(module))
    table.probed("EulerAncestralDiscreteScheduler", {}, 3)
    assert dict(vars(module)) == before
    assert torch.get_default_dtype() == torch.float32
