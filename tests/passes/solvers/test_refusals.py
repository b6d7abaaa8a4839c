"""Grids, steps and ends that no method can run on: refused in one sentence that says why."""

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.compress import compress
from hasten.passes.solvers.flow_grid import flow_grid
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.hooks import Clip, Threshold
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.schedule import spaced
from hasten.passes.solvers.unipc import unipc

EPSILON, FLOW = Process.diffusion(), Process.flow()
ZERO_SNR = Process.diffusion(prediction="v_prediction", zero_snr=True)
ZERO_END = Grid(np.arange(3), *variance_preserving(np.array([3.0, 2.0, 1.0, 0.0])))


@pytest.mark.parametrize(
    ("text", "process", "steps", "message"),
    [
        # orders with a zero end
        ("dpm-solver:form=noise", EPSILON, 5, "the noise form cannot reach a zero noise level, where its weights are"),
        ("dpm-singlestep:form=noise", EPSILON, 5, "dpm-singlestep: the noise form cannot reach a zero noise level"),
        ("unipc:form=noise", EPSILON, 5, "unipc: the noise form cannot reach a zero noise level"),
        (
            "unipc:lower_order_final=false",
            EPSILON,
            5,
            "order 2 cannot step to a zero noise level, whose log-SNR is inf",
        ),
        ("dpm-singlestep:form=sde-noise,end=sigma_min", EPSILON, 5, "no singlestep solver in the sde-noise form"),
        # fewer steps than a start needs
        ("pndm", EPSILON, 3, "pndm: 3 steps were asked for; its three Runge-Kutta steps and one more need at least 4"),
        ("pndm", EPSILON, 600, "pndm: 600 steps leave no time between those of the grid for Runge-Kutta; take fewer"),
        ("ddim", EPSILON, 0, "0 sampling steps were asked for; the schedule has times for 1 to 1000"),
        ("unipc", EPSILON, 1001, "1001 sampling steps were asked for; the schedule has times for 1 to 1000"),
        ("unipc", EPSILON, 1000, "the noise does not fall from level 499 to level 500; times and levels must descend"),
        ("unipc", FLOW, 0, "0 sampling steps were asked for; at least 1 is needed"),
        ("flow-euler:terminal=0.1", FLOW, 1, "the only level is 1, which no stretch moves"),
        ("euler:offset=1000", EPSILON, 5, None),
        ("euler:spacing=leading,offset=300", EPSILON, 5, "starts at 1100, past the last training time 999; lower the"),
        # grids of the caller's
        ("euler:times=100/500", EPSILON, 2, "times must descend, each given once; 100, 500 were given"),
        ("unipc:times=500/500/1", EPSILON, 3, "times must descend, each given once; 500, 500, 1 were given"),
        ("ddim:times=1000/1", EPSILON, 2, "times go from 0 to 999; 1000, 1 were given"),
        ("plms:times=10/-1", EPSILON, 2, "times go from 0 to 999; 10, -1 were given"),
        ("plms:times=10/5/1", EPSILON, 2, "2 steps were asked for with 3 times; give one time a step"),
        ("lms:sigmas=1/2", EPSILON, 2, "sigmas must be finite and descend, to more than 0"),
        ("lms:sigmas=2/inf", EPSILON, 2, "sigmas must be finite and descend"),
        ("lms:sigmas=2/nan", EPSILON, 2, "is not numbers with '/' between them"),
        ("lms:sigmas=2/1/0", EPSILON, 3, "sigmas must be finite and descend, to more than 0"),
        ("lms:sigmas=2/1", EPSILON, 3, "3 steps were asked for with 2 sigmas; give one sigma a step"),
        ("lms:sigmas=2/1,times=9/1", EPSILON, 2, "both times and sigmas were given; give one of them"),
        ("lms:sigmas=2/1,levels=karras", EPSILON, 2, "karras levels were asked for and sigmas were given; leave one"),
        ("flow-euler:sigmas=1.5/1", FLOW, 2, "sigmas must descend, from at most 1 to more than 0"),
        ("flow-euler:mu=-1,time_shift=linear", FLOW, 2, "flow-euler: mu is -1; it must be positive"),
        ("flow-euler:mu=1000", FLOW, 2, "flow-euler: mu is 1000; the shift it stands for is not finite"),
        # no signal at the first level
        ("ddim:spacing=trailing", Process(bars=ZERO_SNR.bars), 5, "epsilon prediction says nothing where the signal"),
        ("plms:spacing=trailing", ZERO_SNR, 5, "plms: the grid starts where the signal level is zero, and its"),
        ("pndm:spacing=trailing", ZERO_SNR, 5, "pndm: the grid starts where the signal level is zero, and its"),
        (
            "guided:solver=ddim:spacing=trailing",
            ZERO_SNR,
            5,
            "guided: the solver starts where the signal level is zero",
        ),
        ("dpm-solver:least_log_snr=-3,spacing=trailing", EPSILON, 500, "the trailing grid without"),
    ],
)
def test_message_says_what_is_wrong(text, process, steps, message):
    if message is None:  # the offset is the leading grid's alone
        assert np.array_equal(build(text, process, steps).time, build("euler", process, steps).time)
        return
    with pytest.raises(UsageError) as caught:
        build(text, process, steps)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid([1, np.nan], [0, 1, 1], [1, 1, 0]), "grid: time has a value that is not finite"),
        (lambda: Grid([], [1], [0]), "grid: no time was given; at least 1 is needed"),
        (
            lambda: Grid([1], [1], [0]),
            "grid: 1 times need 2 signal and noise levels, the end's too; 1 and 1 were given",
        ),
        (lambda: Grid([2, 1], [0.1, -0.2, 1], [1, 1, 0]), "grid: a signal or noise level is negative"),
        (lambda: Grid([2, 1], [0.5, 0.5, 1], [0.5, 0.5, 0]), "the noise does not fall from level 0 to level 1"),
        (lambda: Grid([2, 1], [0.1, 0.5, 0.4], [1, 0.5, 0.6]), "the noise does not fall from level 1 to level 2"),
        (lambda: flow_grid(2, start="zero"), "flow: start 'zero' is none of one, below, almost."),
        (lambda: flow_grid(2, time_shift="linar"), "Did you mean 'linear'?"),
        (lambda: unipc(Grid([2, 1], [0, 0.5, 1], [1, 0.5, 0])), "the grid starts where the signal level is zero"),
        (lambda: unipc(ZERO_END, variant="bh"), "unipc: variant 'bh' is none of bh1, bh2."),
        (lambda: unipc(ZERO_END, order=4), "unipc: order is 4; it goes from 1 to 3"),
        (lambda: unipc(ZERO_END, form="x0"), "unipc: form 'x0' is none of data, noise."),
        (
            lambda: Process(bars=[0.5, 0.9]),
            "process: alpha_bar falls from below 1 to 0 at least; it goes from 0.5 to 0.9",
        ),
        (lambda: Process(bars=[0.5, np.nan]), "process: alpha_bar is one finite number a training time"),
        (lambda: Process("eps"), "unknown prediction type 'eps'"),
        (lambda: Process.of({}), "process: neither beta_schedule nor shift is in what was given"),
        (lambda: caf(0), "caf: 0 sampling steps were asked for; at least 1 is needed"),
        (lambda: caf(3, fraction=0), "caf: fraction is 0"),
        (lambda: Clip(0), "clip: the limit is 0; it must be positive"),
        (lambda: Threshold(1.5), "threshold: the ratio is 1.5; a quantile goes from 0 to 1"),
        (lambda: Threshold(largest=0.5), "threshold: the largest value is 0.5; it is at least 1"),
        (lambda: spaced("even", 5, 1000), "unknown spacing 'even'; there are leading, trailing, linspace."),
        (lambda: compress(np.ones((3, 3)), [1, 2]), "an evaluation depends on a later one"),
        (lambda: compress(np.zeros((2, 2)), [1, 2]), "need a matrix of (3, 3), not (2, 2)"),
        (
            lambda: sample(lambda y, t: y, build("stsp", EPSILON, 3), np.ones(2)),
            "sample: the solver evaluates 2 networks; 1 were given",
        ),
        (
            lambda: sample([lambda y, t: y, lambda y, t, v: y], caf(2), np.ones(2), hook=Clip()),
            "sample: row 0 says nothing about x0, which the hook is for; sample without it",
        ),
    ],
)
def test_builders_say_what_is_wrong(make, message):
    with pytest.raises(UsageError) as caught:
        make()
    assert message in str(caught.value)
