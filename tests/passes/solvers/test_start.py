"""Where a run from a picture begins: the levels are the solver's own, and a solver with a memory starts anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import solvers as tables

from hasten.errors import UsageError
from hasten.passes.solvers.catalog import build, parse
from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.start import begun, levels, seen

DIFFUSION = Process.diffusion("scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = Process.flow(3.0)


@pytest.mark.parametrize(
    ("solver", "process", "row", "expected"),
    [
        # noise falls from the first row to the last whatever the network is told: here 1 - s
        ("flow-euler:invert=true", FLOW, 2, (0.398, 0.602)),
        ("flow-euler:times=1000/400/200/100,shift=2", FLOW, 1, (1 - 0.8 / 1.4, 0.8 / 1.4)),
        ("euler:sigmas=200/5/1/0.2", DIFFUSION, 0, (1 / 200, 1.0)),
        ("euler:sigmas=20/5/1/0.2", DIFFUSION, 2, (0.5**0.5, 0.5**0.5)),
        ("ddim", DIFFUSION, 1, (DIFFUSION.bars[500] ** 0.5, (1 - DIFFUSION.bars[500]) ** 0.5)),  # type: ignore[index]
    ],
)
def test_the_levels_are_the_tables_own(solver: str, process: Process, row: int, expected: tuple[float, float]) -> None:
    table = build(solver, process, 4)
    np.testing.assert_allclose(seen(table, process)[row], expected, atol=1e-3)
    start = begun(table, process, 1 - row / 4)
    assert (start.row, len(start.table)) == (row, 4 - row)
    np.testing.assert_allclose((start.signal, start.noise), expected, atol=1e-3)


def test_levels_that_a_table_does_not_know_are_the_trainings() -> None:
    table = build("ddim", DIFFUSION, 4)
    some = table.level.copy()
    some[1] = 0
    found = seen(replace(table, level=some), DIFFUSION)
    np.testing.assert_allclose(found, levels(DIFFUSION, table.time), atol=1e-12)
    assert found[1].all()


def test_what_is_left_is_the_same_sampler() -> None:
    """Of one latent: the rows as they are, noise and hook among them."""
    table = build("ddim:eta=1,clip=1", DIFFUSION, 6)
    left = begun(table, DIFFUSION, 0.5).table
    assert left.noisy == tuple(row - 3 for row in table.noisy if row >= 3)
    assert left.hook == table.hook
    np.testing.assert_array_equal(left.level, table.level[3:])
    np.testing.assert_array_equal(left.A, table.A[3:])


def test_a_solver_with_a_memory_starts_anew_where_it_can() -> None:
    for name in ("unipc:order=3", "dpm++2m", "deis", "lms"):
        asked = parse(name)
        table = asked.build(DIFFUSION, 8)
        start = begun(table, DIFFUSION, 0.5, lambda row, a=asked: a.build(DIFFUSION, 8, first=row))
        assert (start.row, len(start.table)) == (4, 4)
        np.testing.assert_array_equal(start.table.time, table.time[4:])
        np.testing.assert_array_equal((start.signal, start.noise), table.level[4])
        assert not start.table.A[0, 0, 1:].any()  # of nothing before the picture
    asked = parse("plms")  # a row more than steps, which are what counts
    start = begun(asked.build(DIFFUSION, 8), DIFFUSION, 0.5, lambda row: asked.build(DIFFUSION, 8, first=row), 8)
    assert (start.row, len(start.table)) == (4, 5)
    with pytest.raises(UsageError, match="the solver carries 3 latents, and its table alone does not say how to begin"):
        begun(build("unipc", DIFFUSION, 8), DIFFUSION, 0.5)
    assert begun(build("unipc", DIFFUSION, 8), DIFFUSION, 1.0).row == 0


LATE: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("LMSDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]


@pytest.mark.parametrize(("kind", "config"), LATE)
def test_every_late_beginning_is_that_of_diffusers(kind: str, config: dict[str, Any]) -> None:
    """The response matrix of what is left, from every step that image-to-image can begin with."""
    pytest.importorskip("diffusers")
    if kind == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    config = config if kind.startswith("FlowMatch") else {**tables.STABLE_DIFFUSION, **config}
    read = read_config({"_class_name": kind, **config})
    for steps in (5, 10, 16):
        whole = read.request.build(read.process, steps)
        for row in range(1, steps):
            strength = (steps - row + 0.5) / steps
            start = begun(
                whole,
                read.process,
                strength,
                lambda row, n=steps: read.request.build(read.process, n, first=row),
                steps,
            )
            wanted, times = tables.probed(kind, config, steps, begin=row)
            assert start.row == row
            np.testing.assert_allclose(start.table.time, times, rtol=1e-9)
            got, init = start.table.response(), start.table.init
            got[:, 0] /= init
            assert tables.difference(got, tables.without_unused_noise(wanted, start.table)) < 1e-12, (steps, row)


@pytest.mark.parametrize(
    ("strength", "message"),
    [(0.0, "strength: 0 given; give more than 0"), (1.5, "strength: 1.5 given"), (0.1, "0.1 of 6 steps is none")],
)
def test_a_strength_that_is_none(strength: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        begun(build("ddim", DIFFUSION, 6), DIFFUSION, strength)
