"""Configurations of diffusers' schedulers: whose they are, what their values must be, what their classes take."""

import inspect
import json

import numpy as np
import pytest
import torch

import hasten
from hasten.errors import UsageError
from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.configuration import DEFAULTS, PROCESS, SAMPLER, X0, configuration
from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.process import Process

diffusers = pytest.importorskip("diffusers")

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "IPNDMScheduler"])  # it has no such options
def test_defaults_are_those_of_the_class(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key, value in DEFAULTS[name].items():
        if key in parameters:
            theirs = parameters[key].default
            assert value == (tuple(theirs) if isinstance(theirs, list) else theirs), key
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    made = getattr(diffusers, name)()
    ours = Process.of({"_class_name": name})
    assert ours.prediction == made.config.get("prediction_type", "flow_prediction")
    if ours.bars is not None:
        assert np.allclose(ours.bars, made.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_every_option_has_its_default_as_a_value_of_its_type():
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    seen = set()
    for kind in classes:
        parameters = inspect.signature(kind.__init__).parameters
        given = {key: p.default for key, p in parameters.items() if p.default not in (None, p.empty)}
        configuration(given)
        seen |= parameters.keys()
    assert {*PROCESS, *X0, *SAMPLER} - seen == {"mu"}


def test_a_scheduler_itself_says_which_solver_and_which_process():
    scheduler = diffusers.DPMSolverMultistepScheduler(**LATENT, solver_order=3)
    sampling = hasten.Sampling(steps=4, process=scheduler)
    text, table = sampling.table()
    assert text.startswith("dpm-solver:order=3")
    wanted = read_config({**scheduler.config, "_class_name": "DPMSolverMultistepScheduler"})
    assert np.array_equal(table.response(), wanted.request.build(wanted.process, 4).response())
    assert np.array_equal(build("unipc", scheduler, 4).response(), build("unipc", wanted.process, 4).response())
    assert sampling.process["_class_name"] == "DPMSolverMultistepScheduler"
    ours = hasten.Scheduler.from_config(scheduler)
    assert hasten.Sampling(steps=4, process=ours).table()[0] == text
    ours = hasten.Scheduler.from_config(scheduler, solver="unipc:order=3")
    assert hasten.Sampling(steps=4, process=ours).table()[0].startswith("unipc:order=3")
    assert hasten.Sampling("deis", steps=4, process=ours).table()[0].startswith("deis")


def test_a_configuration_of_no_class_needs_a_solver():
    config = diffusers.EulerDiscreteScheduler(**LATENT).config
    with pytest.raises(UsageError, match=r"does not say whose it is \(_class_name\); give the scheduler itself, or"):
        hasten.Sampling(steps=3, process=config).table()
    with pytest.raises(UsageError, match="does not say whose it is"):
        hasten.Sampling(steps=3, process={"shift": 3.0, "stochastic_sampling": True}).table()
    assert hasten.Sampling("euler", steps=3, process=config).table()[0].startswith("euler:")
    # what says how the network was trained, and no more, takes the plain solver
    assert hasten.Sampling(steps=3, process=LATENT).table()[0].startswith("ddim:")
    assert hasten.Sampling(steps=3, process={"shift": 3.0}).table()[0].startswith("flow-euler:")


def test_a_class_without_a_solver_needs_one():
    lcm = diffusers.LCMScheduler()
    with pytest.raises(UsageError, match=r"no solver for diffusers' LCMScheduler; there are .*name a solver"):
        hasten.Sampling(steps=3, process=lcm).table()
    assert hasten.Sampling("ddim", steps=3, process=lcm).table()[0].startswith("ddim:")


def test_arrays_become_plain_values_that_a_manifest_can_hold():
    for betas in (np.array([0.1, 0.2]), torch.tensor([0.1, 0.2]), (0.1, 0.2)):
        given = configuration({"trained_betas": betas, "beta_schedule": "linear", "num_train_timesteps": np.int64(2)})
        assert json.loads(json.dumps(given))["trained_betas"] == pytest.approx([0.1, 0.2])
        assert Process.of(given).bars.tolist() == pytest.approx([0.9, 0.72])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": "abc"}, "num_train_timesteps: 'abc' is not a whole number (the training's times)"),
        ({"num_train_timesteps": -3}, "num_train_timesteps: -3 was given; it goes from 1"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps: 1000.5 is not a whole number"),
        ({"num_train_timesteps": None}, "num_train_timesteps: None is not a whole number"),
        ({"beta_start": "x"}, "beta_start: 'x' is not a number (the first variance of the schedule)"),
        ({"beta_start": None}, "beta_start: None is not a number"),
        ({"beta_start": True}, "beta_start: True is not a number"),
        ({"beta_start": -0.1}, "beta_start: -0.1 was given; it goes from 0 to 1"),
        ({"beta_end": float("nan")}, "beta_end: nan is not a number"),
        ({"beta_schedule": 3}, "beta_schedule: 3 is not a word (the schedule's name)"),
        ({"beta_schedule": "cosine"}, "unknown noise schedule 'cosine'"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas: 'x' is not a number"),
        ({"trained_betas": [0.1, 2]}, "trained_betas: 2 was given; it goes from 0 to 1"),
        ({"trained_betas": "abc"}, "trained_betas: 'abc' is not a list of numbers (all variances of the schedule)"),
        ({"prediction_type": 5}, "prediction_type: 5 is not a word (what the network predicts)"),
        ({"prediction_type": "eps"}, "unknown prediction type 'eps'"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr: 'yes' is not true or false"),
        ({"snr_shift_scale": 0}, "snr_shift_scale: 0 was given; it goes from 1e-06"),
        ({"use_flow_sigmas": True, "flow_shift": "abc"}, "flow_shift: 'abc' is not a number"),
        ({"use_flow_sigmas": True, "flow_shift": 0}, "flow_shift: 0 was given; it goes from 1e-06"),
        ({"clip_sample": True, "clip_sample_range": "x"}, "clip_sample_range: 'x' is not a number"),
        ({"_class_name": 5}, "_class_name: 5 is not a word"),
        ({"solver_order": "two"}, "solver_order: 'two' is not a whole number"),
        ({"disable_corrector": [0.5]}, "disable_corrector: 0.5 is not a whole number"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(changes, message):
    config = {"_class_name": "DDIMScheduler", **LATENT, "clip_sample": False, **changes}
    for read in (
        lambda: hasten.Sampling(steps=3, process=config).table(),
        lambda: hasten.Scheduler.from_config(config),
        lambda: build("unipc", config, 3),
    ):
        with pytest.raises(UsageError) as caught:
            read()
        assert message in str(caught.value)


@pytest.mark.parametrize("given", ["scheduler_config.json", 3, [1], diffusers.DDIMScheduler])
def test_what_is_no_configuration_is_refused(given):
    message = "process: expected a diffusers scheduler or its configuration .*, found "
    for read in (lambda: hasten.Sampling(process=given), lambda: build("unipc", given, 3), lambda: Process.of(given)):
        with pytest.raises(UsageError, match=message + type(given).__name__):
            read()


def test_null_stands_for_the_default_where_it_can():
    config = {"_class_name": "UniPCMultistepScheduler", "trained_betas": None, "use_karras_sigmas": None}
    read = read_config(
        {**config, "use_flow_sigmas": True, "flow_shift": None, "disable_corrector": [], "lambda_min_clipped": None}
    )
    assert (read.process.is_flow, read.process.shift) == (True, 1.0)
