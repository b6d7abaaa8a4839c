"""LTSP and STSP: what is left of them without a guide and without a denoiser, what they cost, and their order."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.classifier_guidance import classifier_guided
from hasten.passes.solvers.dpm_solver import dpm_solver
from hasten.passes.solvers.euler import euler, lms
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.pndm import plms
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.splitting import DENOISER, GUIDE, ltsp, stsp
from hasten.passes.solvers.unipc import unipc

GOLDEN = json.loads((Path(__file__).parent / "trajectories.json").read_text())
WEIGHT = GOLDEN["splitting"]["weight"]


def grid(steps: int) -> Grid:
    ratios = np.geomspace(*GOLDEN["splitting"]["interval"], steps + 1)
    return Grid(np.arange(steps, 0, -1.0), *variance_preserving(ratios))


def denoise(y, t):
    return np.tanh(y + 0.1 * t)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("solver", [ltsp, stsp])
def test_without_a_guide_it_is_plms(solver, order):
    """PLMS as it starts from a picture: with no time to correct its first step, its order grows from 1."""
    steps, given = 9, grid(9)
    late = late_plms(given)
    split = solver(given, order=order, weight=0.0)
    assert np.array_equal(split.time, late.time)
    same = steps + 1 if order == 4 else order + 1  # inputs before the order stops growing, or all and the result
    np.testing.assert_allclose(split.response()[:same], late.response()[:same], rtol=1e-13, atol=1e-14)
    if order == 1:
        euler = lms(given, order=1).response()
        euler[-1] *= given.signal[-1]  # its result is x / a
        np.testing.assert_allclose(split.response(), euler, rtol=1e-13, atol=1e-14)
    x = np.linspace(-1, 1, 5)
    weighed = sample([denoise, lambda y, t: y * 0], solver(given, order=order, weight=WEIGHT), x)
    np.testing.assert_allclose(weighed, sample(denoise, split, x), rtol=1e-13)


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize(("solver", "parts"), [(ltsp, (0.0, 1.0)), (stsp, (0.5, 0.5))])
def test_without_a_denoiser_it_is_eulers_method_of_the_guide(solver, parts, order):
    """In two halves for STSP, each at its own level; all of it at the new level for LTSP."""
    given, x = grid(7), np.linspace(-1, 1, 5)
    times, ratio = [*given.time, 0.0], given.noise / given.signal

    def guide(y, t):
        return np.cos(2 * y + t)

    scaled = x / given.signal[0]
    for i in range(len(given)):
        for level, part in zip((i, i + 1), parts, strict=True):
            slope = -WEIGHT * given.noise[level] * guide(scaled * given.signal[level], times[level])
            scaled = scaled + part * (ratio[i + 1] - ratio[i]) * slope
    got = sample([lambda y, t: y * 0, guide], solver(given, order=order, weight=WEIGHT), x)
    np.testing.assert_allclose(got, scaled * given.signal[-1], rtol=1e-12)
    assert not np.allclose(got, x / given.signal[0] * given.signal[-1], rtol=0.1)


@pytest.mark.parametrize("end", ["sigma_min", "zero"])
@pytest.mark.parametrize(("name", "wanted"), [("ltsp", [DENOISER, GUIDE]), ("stsp", [GUIDE, DENOISER, GUIDE])])
def test_calls_of_each_network(name, wanted, end):
    """One of the denoiser a step, and of the guide one or two; at an end without noise it has no say."""
    steps, calls = 6, []

    def network(number):
        def record(y, t):
            calls.append(number)
            return np.tanh(y)

        return record

    table = build(f"{name}:spacing=trailing,end={end}", Process.diffusion(), steps)
    sample([network(DENOISER), network(GUIDE)], table, np.ones(3))
    assert calls == (wanted * steps)[: None if end == "sigma_min" else -1]


COUNTS = (160, 320)
PROBLEMS = {
    "mixture": (
        lambda mixture, y, a, b: mixture.answer("epsilon", y, a, b),
        lambda mixture, y, a, b: mixture.guide(y, a, b, GOLDEN["splitting"]["component"]),
    ),
    # a guide that moves one coordinate as the other says, and a denoiser that looks at the other alone
    "shear": (
        lambda mixture, y, a, b: np.stack([np.tanh(2 * y[:, 0] + b), np.cos(y[:, 0])], 1),
        lambda mixture, y, a, b: np.stack([0 * y[:, 0], np.sin(3 * y[:, 0]) / b], 1),
    ),
}
"""eps and the gradient of the logarithm of a probability, of y at signal level a and noise level b."""


@pytest.fixture(scope="module")
def ends(mixture):
    """The guided solution x / a at the end."""
    found, ratios = {}, np.geomspace(*GOLDEN["splitting"]["interval"], 1201)
    for name, (eps, guide) in PROBLEMS.items():

        def guided(y, a, b, eps=eps, guide=guide):
            return eps(mixture, y, a, b) - WEIGHT * b * guide(mixture, y, a, b)

        found[name] = mixture.exact(ratios, mixture.noise, guided)[-1] * np.sqrt(1 + ratios[-1] ** 2)
    return found


def error(mixture, ends, problem, table):
    """The largest error of x / a at the end."""
    levels = iter(table.level.tolist())
    networks = [lambda y, t, says=says: says(mixture, y, *next(levels)) for says in PROBLEMS[problem]]
    end = sample(networks, table, mixture.noise) / table.level[-1, 0]
    return float(np.abs(end - ends[problem]).max())


@pytest.mark.parametrize("inner", [1, 2, 3, 4])
@pytest.mark.parametrize("solver", [ltsp, stsp])
def test_orders(mixture, ends, solver, inner):
    """Euler's steps of the guide and a history of guided samples are of order 1, and with them the whole is.

    The shear has neither error: its guide is constant along its own way, and leaves what the denoiser looks at as it
    is. There Lie-Trotter splitting is of order 1, and Strang splitting of 2 if the denoiser's method is.
    """
    own = 1 if solver is ltsp else min(inner, 2)
    for problem, order in (("mixture", 1), ("shear", own)):
        before, after = (error(mixture, ends, problem, solver(grid(n), order=inner, weight=WEIGHT)) for n in COUNTS)
        assert np.log2(before / after) == pytest.approx(order, abs=0.1)


def late_plms(given):
    """PLMS from order 1 up, as from a picture."""
    bars = np.append(given.signal[::-1] ** 2, 0.01)  # and the time before, which a late start leaves out
    times = range(len(given) + 1, 0, -1)
    return plms(len(given) + 1, bars, times=times, compat=None, first=2)


ON_THE_SUM = {
    "euler": (euler, 1),
    "dpm++ 2m": (partial(dpm_solver, lower_order_final=False), 2),
    "plms": (late_plms, 2),
    "unipc 2": (partial(unipc, order=2, lower_order_final=False), 3),
    "lms 3": (partial(lms, order=3), 3),
}
"""Methods of one network, on eps and guide together."""


@pytest.mark.parametrize("name", ON_THE_SUM)
def test_orders_of_guided_methods(mixture, ends, name):
    make, order = ON_THE_SUM[name]
    tables = [classifier_guided(make(grid(n)), Process.diffusion(), WEIGHT) for n in COUNTS]
    before, after = (error(mixture, ends, "mixture", table) for table in tables)
    assert np.log2(before / after) == pytest.approx(order, abs=0.1)


def test_errors_are_those_of_the_reference(mixture, ends):
    """Of another program of the same methods: STSP's is about half of LTSP's and of guided Euler's."""
    wanted = dict(GOLDEN["errors"]["guided"])
    given, got = grid(wanted.pop("steps")), {}
    for name in wanted:
        if name in ON_THE_SUM:
            table = classifier_guided(ON_THE_SUM[name][0](given), Process.diffusion(), WEIGHT)
        else:
            table = {"ltsp": ltsp, "stsp": stsp}[name[:-1]](given, order=int(name[-1]), weight=WEIGHT)
        got[name] = error(mixture, ends, "mixture", table)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert got["stsp4"] / got["ltsp4"] == pytest.approx(0.5, abs=0.1)
    assert got["stsp4"] / got["euler"] == pytest.approx(0.5, abs=0.1)
