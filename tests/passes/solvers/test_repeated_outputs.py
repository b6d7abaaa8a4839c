"""A network whose outputs are repeated, as step caches do: the table goes where diffusers goes with the same ones."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import solvers as tables
import torch

from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.sample import sample

diffusers = pytest.importorskip("diffusers")

SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]
START = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STEPS = 12


class Repeating:
    """A network that is evaluated where ``evaluate`` says, and elsewhere says what it has said last."""

    def __init__(self, evaluate: list[bool]) -> None:
        self.evaluate, self.calls, self.said = evaluate, 0, torch.empty(0)

    def __call__(self, y: torch.Tensor, t: float) -> torch.Tensor:
        if self.evaluate[self.calls]:
            self.said = torch.tanh(y) + 1e-4 * float(t)
        self.calls += 1
        return self.said


def theirs(kind: str, config: dict[str, Any], network: Repeating, draws: torch.Tensor) -> torch.Tensor:
    """The loop of a pipeline, in float64."""
    made_by = getattr(diffusers, kind)
    module = sys.modules[made_by.__module__]
    noise = iter(draws)
    with tables.widened(module), pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(module, "randn_tensor"):
            patched.setattr(module, "randn_tensor", lambda *a, **k: next(noise))
        scheduler = made_by(**config)
        scheduler.set_timesteps(STEPS)
        x = START * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if tables.scales(scheduler) else x
            x = scheduler.step(network(seen, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("rule", ["every second", "the first and the last", "every fourth, twice"])
@pytest.mark.parametrize(("kind", "config"), SCHEDULERS)
def test_the_result_is_that_of_diffusers(kind: str, config: dict[str, Any], rule: str) -> None:
    config = config if kind.startswith("FlowMatch") else {**tables.STABLE_DIFFUSION, **config}
    read = read_config({"_class_name": kind, **config})
    table = read.request.build(read.process, STEPS)
    rows = range(len(table))
    evaluate = {
        "every second": [i % 2 == 0 for i in rows],
        "the first and the last": [i in (0, rows[-1]) for i in rows],
        "every fourth, twice": [i % 4 < 2 for i in rows],
    }[rule]
    draws = torch.randn(len(rows), *START.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = theirs(kind, config, Repeating(evaluate), draws)
    # diffusers draws for every step, also where it needs none
    noise = draws[list(table.noisy)] if table.noisy else None
    ours, plain = (
        sample(network, table, START, noise=noise, hook=read.hook)
        for network in (Repeating(evaluate), Repeating([True] * len(rows)))
    )
    scale = float(wanted.abs().max())
    assert float((ours - wanted).abs().max()) < 1e-11 * scale
    assert float((plain - wanted).abs().max()) > 1e-3 * scale
