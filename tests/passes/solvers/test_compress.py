"""The smallest table with a response matrix: how many latents a method must carry, and that it is the same method."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.compress import compress
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample

DIFFUSION, FLOW = Process.diffusion(prediction="v_prediction"), Process.flow(3.0)
LATENTS = {
    **dict.fromkeys(("ddim", "ddim:eta=1", "euler", "euler-ancestral", "dpm-solver:order=1"), 1),
    **dict.fromkeys(("dpm-solver:order=1,form=sde-data", "dpm-solver:order=1,form=sde-noise,end=sigma_min"), 1),
    **dict.fromkeys(
        ("dpm++2m", "dpm++2m:slope=heun", "dpm-2m", "dpm++2m-sde", "deis:order=2", "lms:order=2", "heun"), 2
    ),
    **dict.fromkeys(("dpm++2s", "dpm++3s", "dpm++3s:slope=heun", "dpm++2s:form=sde-data"), 2),
    **dict.fromkeys(("dpm++3m", "dpm-3m", "dpm++3m:form=sde-data", "deis:order=3", "lms:order=3"), 3),
    **{f"unipc:order={order}": order + 1 for order in (1, 2, 3)},
    **{f"unipc:order={order},form=noise,end=sigma_min": order + 1 for order in (1, 2, 3)},
    **dict.fromkeys(("plms", "ipndm", "lms:order=4"), 4),
    "pndm": 5,
    **{f"{split}:order={order}": order for split in ("ltsp", "stsp") for order in (1, 2, 3, 4)},
    "caf": 2,
}
OF_FLOWS = {"flow-euler": 1, "flow-euler:stochastic=true": 1, "heun": 2, "dpm++2m": 2, "unipc:order=3": 4}
METHODS = [*((name, k, DIFFUSION) for name, k in LATENTS.items()), *((name, k, FLOW) for name, k in OF_FLOWS.items())]


@pytest.mark.parametrize(("name", "latents", "process"), METHODS)
def test_the_smallest_table(name, latents, process):
    made = build(name, process, 20)
    response = made.response()
    small = compress(response, made.time, made.noisy)
    assert small.width == latents <= made.width
    assert small.noisy == made.noisy
    assert np.abs(small.response() - response).max() <= 1e-13 * np.abs(response).max()


@pytest.mark.parametrize("name", ["dpm++3s", "pndm", "unipc:order=3", "dpm++2s:form=sde-data"])
def test_it_is_the_same_sampler(name):
    made = build(name, DIFFUSION, 20)
    small = compress(made.response(), made.time, made.noisy)
    noise = np.random.default_rng(0).normal(size=(len(made.noisy), 7))

    def run(table):
        return sample(lambda y, t: np.tanh(y) + 1e-4 * t, table, np.linspace(-1, 1, 7), noise=noise)

    np.testing.assert_allclose(run(small), run(made), rtol=1e-10, atol=1e-12)


def test_the_second_input_of_a_network_is_no_part_of_it():
    """CAF's response is that of its outputs; what the acceleration sees beside the sample is a column of its own."""
    made = caf(5)
    small = compress(made.response(), made.time)
    assert small.width == made.width == 2
    assert not small.conditioned
    assert made.conditioned == {1}
