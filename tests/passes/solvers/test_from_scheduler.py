"""Tables of diffusers' schedulers by probing, the smallest there are; and what is no table, by name."""

import numpy as np
import pytest
import solvers as table
import torch

from hasten.errors import UsageError
from hasten.passes.solvers.catalog import build, names
from hasten.passes.solvers.compress import compress
from hasten.passes.solvers.from_config import CLASSES, read_config
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.table import SolverTable

diffusers = pytest.importorskip("diffusers")

SMALLEST = [
    ("DDIMScheduler", {"clip_sample": False}, 1),
    ("EulerDiscreteScheduler", {}, 1),
    ("EulerAncestralDiscreteScheduler", {}, 1),
    ("FlowMatchEulerDiscreteScheduler", {}, 1),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 1),
    ("DPMSolverMultistepScheduler", {}, 2),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 2),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 3),
    ("DPMSolverSinglestepScheduler", {}, 2),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, 2),
    ("DEISMultistepScheduler", {}, 2),
    ("HeunDiscreteScheduler", {}, 2),
    ("UniPCMultistepScheduler", {}, 3),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 4),
    ("PNDMScheduler", {"skip_prk_steps": True}, 4),
    ("PNDMScheduler", {}, 5),
    ("IPNDMScheduler", {}, 4),
]


@pytest.mark.parametrize(("kind", "config", "width"), SMALLEST)
def test_the_smallest_table_has_the_response_of_the_builder(kind, config, width):
    given = config if kind.startswith(("Flow", "IPNDM")) else {**table.STABLE_DIFFUSION, **config}
    scheduler = getattr(diffusers, kind)(**given)
    probed = SolverTable.from_scheduler(scheduler, 20)
    assert probed.width == width
    read = read_config({**scheduler.config, "_class_name": kind})
    made = read.request.build(read.process, 20)
    assert probed.noisy == made.noisy
    assert table.difference(probed.response(), made.response()) < 2e-5
    assert np.allclose(probed.time, made.time, atol=1e-3)


OTHERS = ["KDPM2DiscreteScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler", "EDMEulerScheduler"]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_scheduler_without_a_builder_is_followed_step_by_step(kind):
    """In the loop of `sample`, with the noise that the scheduler draws."""
    scheduler = getattr(diffusers, kind)()
    assert kind not in CLASSES
    probed = SolverTable.from_scheduler(scheduler, 6)
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))

    def network(y, t):
        return torch.tanh(y)

    scheduler.set_timesteps(6)
    generator, draws = torch.Generator().manual_seed(5), []
    sample_of_theirs = x * float(scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps):
        before = generator.get_state()
        seen = scheduler.scale_model_input(sample_of_theirs, t)
        takes = scheduler.step.__code__.co_varnames
        extra = {"generator": generator} if "generator" in takes else {}
        sample_of_theirs = scheduler.step(network(seen, t), t, sample_of_theirs, **extra).prev_sample
        if i in probed.noisy:
            draws.append(torch.randn(x.shape, generator=torch.Generator().set_state(before)))
    got = sample(network, probed, x, noise=draws)
    assert (got - sample_of_theirs).abs().max() < 3e-4 * sample_of_theirs.abs().max()


def test_options_of_the_steps_and_of_the_grid():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    assert SolverTable.from_scheduler(scheduler, 5).noisy == ()
    assert SolverTable.from_scheduler(scheduler, 5, eta=1.0).noisy == (0, 1, 2, 3)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    probed = SolverTable.from_scheduler(flow, 4, timesteps={"mu": 1.0, "sigmas": [1.0, 0.7, 0.4, 0.1]})
    made = build("flow-euler:mu=1,sigmas=1/0.7/0.4/0.1", Process.flow(), 4)
    assert table.difference(probed.response(), made.response()) < 1e-6


def test_the_scheduler_is_left_as_it_is():
    scheduler = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(3)
    before = scheduler.timesteps.clone()
    SolverTable.from_scheduler(scheduler, 9)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.step_index is None


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (
            lambda: diffusers.DDIMScheduler(),
            5,
            r"DDIMScheduler is not linear: it clips the predicted sample \(clip_sample",
        ),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True),
            5,
            "DPMSolverMultistepScheduler is not linear: it thresholds the predicted sample",
        ),
        (
            lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="learned"),
            5,
            "takes a variance from the net",
        ),
        (lambda: Squaring(), 5, "Squaring is not linear: with random outputs its samples are .*% away"),
        (lambda: Bounded(), 5, "Bounded is not linear: with random outputs"),
        (lambda: diffusers.EulerDiscreteScheduler(), 0, "^EulerDiscreteScheduler: 0 sampling steps were asked for; at"),
        (lambda: None, 4, "expected a diffusers scheduler, found NoneType, which has no set_timesteps"),
        (lambda: diffusers.DDIMScheduler().config, 4, "expected a diffusers scheduler, found FrozenDict, which has no"),
        (lambda: diffusers.PNDMScheduler(), 2, "PNDMScheduler refuses 2 steps: operands could not be broadcast"),
        (
            lambda: diffusers.UniPCMultistepScheduler(solver_type="bh1"),
            5,
            "gives values that are not finite at 5 steps",
        ),
    ],
)
def test_message_says_what_is_wrong(make, steps, message):
    with pytest.raises(UsageError, match=message):
        SolverTable.from_scheduler(make(), steps)


class Squaring:
    """As little of a scheduler as there can be."""

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps, 0, -1)

    def step(self, output, t, sample, return_dict=True):
        return (sample + output * output,)


class Bounded(Squaring):
    """Linear for the basis vectors, and not beyond."""

    def step(self, output, t, sample, return_dict=True):
        return ((sample + output * 0.1).clamp(-5, 5),)


@pytest.mark.parametrize("name", names())
def test_compressed_tables_repeat_the_response(name):
    process = Process.flow(3.0) if name.startswith("flow") else Process.diffusion(prediction="v_prediction")
    made = build(name, process, 12)
    small = compress(made.response(), made.time, made.noisy, tolerance=1e-9)
    assert small.width <= made.width
    assert small.noisy == made.noisy
    assert np.allclose(small.response(), made.response(), rtol=0, atol=1e-8 * np.abs(made.response()).max())


def test_a_full_matrix_needs_many_latents():
    response = np.tril(np.random.default_rng(0).normal(size=(7, 7)))
    assert compress(response, np.arange(6)).width == 4
