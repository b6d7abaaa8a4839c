"""Response matrices equal those of diffusers' schedulers, in float64 and as they are."""

from __future__ import annotations

import logging
from collections import defaultdict

import pytest
import solvers as table
import torch

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
