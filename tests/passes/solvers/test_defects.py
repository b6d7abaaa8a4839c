"""Each difference of the references from the published methods: followed with compat="diffusers", gone without."""

from dataclasses import replace

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers import defects
from hasten.passes.solvers.catalog import build, names, parse
from hasten.passes.solvers.defects import follows
from hasten.passes.solvers.dpm_solver import dpm_solver
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.ipndm import ipndm
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample

EPSILON, VELOCITY = Process.diffusion(), Process.diffusion(prediction="v_prediction")


def both(text, process, steps):
    """The table as diffusers has it, and as published."""
    separator = "," if ":" in text else ":"
    return build(text, process, steps), build(f"{text}{separator}compat=none", process, steps)


def differ(text, process, steps):
    one, other = (t.response() for t in both(text, process, steps))
    return np.abs(one - other).max() / np.abs(other).max()


@pytest.mark.parametrize(("spacing", "steps", "off"), [("linspace", 10, 11), ("trailing", 30, 1), ("trailing", 25, 0)])
def test_fixed_stride(spacing, steps, off):
    theirs, ours = both(f"ddim:spacing={spacing}", EPSILON, steps)
    assert np.array_equal(theirs.time, ours.time)
    # where steps land, from the factors of x: the root of alpha_bar there over that here
    roots = np.sqrt(EPSILON.bars)
    landed = theirs.fold().A[:-1, 0, 0] * roots[theirs.time[:-1].astype(int)]
    late = np.interp(landed, roots[::-1], np.arange(1000.0)[::-1]) - theirs.time[1:]
    assert np.abs(late).max() == pytest.approx(off, abs=1e-6)
    assert bool(off) == (differ(f"ddim:spacing={spacing}", EPSILON, steps) > 1e-9)


def test_halved_second_difference():
    assert differ("dpm++3m", EPSILON, 10) > 1e-3
    assert differ("dpm++2m", EPSILON, 10) == 0


def test_sde_second_difference_sign():
    assert differ("dpm-solver:order=3,form=sde-data", EPSILON, 10) > 1e-3
    assert differ("dpm-singlestep:order=3,form=sde-data,slope=heun", EPSILON, 10) > 1e-3


def test_sde_noise_form_of_order_3():
    with pytest.raises(UsageError, match="diffusers has no third-order update in the sde-noise form; take order=2"):
        build("dpm-solver:order=3,form=sde-noise,end=sigma_min", EPSILON, 10)
    table = build("dpm-solver:order=3,form=sde-noise,end=sigma_min,compat=none", EPSILON, 10)
    assert len(table.noisy) == 10


def test_bh1_to_a_zero_end():
    with pytest.raises(UsageError, match="bh1 gives NaN in diffusers"):
        build("unipc:variant=bh1", EPSILON, 5)
    finite = build("unipc:variant=bh1,compat=none", EPSILON, 5)
    assert np.isfinite(finite.response()).all()


def test_mixed_velocities():
    assert differ("plms", VELOCITY, 10) > 1e-3
    assert differ("plms", EPSILON, 10) == 0

    def wander(compat):
        """How far inputs stray from a c + b e for a network that knows the picture c."""
        table = build(f"pndm:compat={compat}", VELOCITY, 10)
        levels, strayed = iter(table.level.tolist()), []

        def network(y, t):
            a, b = next(levels)
            eps = (y - a * 0.7) / b
            strayed.append(eps[0])
            return a * eps - b * 0.7

        sample(network, table, np.array([0.4]))
        return np.ptp(strayed)

    assert wander("diffusers") > 1e-2
    assert wander("none") < 1e-12


def test_shifted_twice():
    flow = Process.flow(3.0)
    for name in ("flow-euler", "heun"):
        theirs, ours = both(name, flow, 5)
        ends = theirs.time[-1] / 1000, ours.time[-1] / 1000
        assert ends == pytest.approx((0.00893, 0.002994), rel=1e-3)
    assert differ("flow-euler", Process.flow(), 5) == 0


@pytest.mark.parametrize(
    "text", ["deis:levels=karras", "unipc:levels=karras,end=sigma_min", "dpm-solver:levels=exponential,end=sigma_min"]
)
def test_repeated_end(text):
    theirs, ours = (t.fold() for t in both(text, EPSILON, 10))
    assert np.array_equal(theirs.level[-1], theirs.level[-2])
    assert ours.level[-1, 1] < ours.level[-2, 1]
    if "unipc" not in text:  # its corrector still uses the last evaluation
        assert np.abs(theirs.B[-1, 0]) < 1e-12
        assert np.abs(ours.B[-1, 0]) > 1e-3
    assert ours.level[-1] == pytest.approx(theirs.level[-1], rel=1e-9)


def test_whole_times():
    theirs, ours = both("dpm++2m-karras", EPSILON, 10)
    assert (theirs.time == np.round(theirs.time)).all()
    assert (ours.time != np.round(ours.time)).sum() > 5
    assert np.abs(theirs.time - ours.time).max() <= 0.5
    theirs, ours = both("unipc", Process.flow(3.0), 10)
    assert np.array_equal(theirs.time, np.floor(ours.time))
    assert np.array_equal(theirs.response(), ours.response())


def test_ignored_first_prediction():
    theirs, ours = ipndm(10), ipndm(10, compat=None)
    first = [table.response()[1, 1] for table in (theirs, ours)]
    assert first[0] == pytest.approx(0, abs=1e-6)  # what the network said of x0 is gone
    assert first[1] == pytest.approx(-theirs.level[1, 0], rel=1e-12)


@pytest.mark.parametrize("first", [1, 2, 6])
def test_missing_history(first):
    grid, scale = EPSILON, 1e-9
    theirs, ours = (parse(f"lms:compat={compat}").build(grid, 10, first=first) for compat in ("diffusers", "none"))
    assert len(theirs) == len(ours) == 10 - first
    ratio = theirs.level[:, 1] / theirs.level[:, 0]
    whole = np.append(ratio[1:-1], 0) - ratio[:-1]
    for table, weighs in ((theirs, False), (ours, True)):
        # all weights of a row, over the length of its step
        ends = np.append(table.level[1:-1, 0], 1)
        share = (table.B[:, 0] + table.A[:, 0, 1:].sum(1)) / ends / whole
        assert (abs(share[0] - 1) < scale) == weighs
        assert share[3:] == pytest.approx(1, rel=1e-9)
    whole_run = (parse(f"lms:compat={compat}").build(grid, 10).response() for compat in ("diffusers", "none"))
    assert np.array_equal(*whole_run)


@pytest.mark.parametrize("process", [EPSILON, VELOCITY])
@pytest.mark.parametrize("first", [1, 2, 6, 9, 10])
def test_late_correction(first, process):
    def wander(compat):
        """How far inputs stray from a c + b e for a network that knows the picture c."""
        table = parse(f"plms:compat={compat}").build(process, 10, first=first)
        assert np.array_equal(table.time, build("plms", process, 10).time[first:])
        assert table.init == 1
        levels, strayed = iter(table.level.tolist()), []
        a, b = table.level[0]
        x = np.array([a * 0.7 + b * 0.4])

        def network(y, t):
            a, b = next(levels)
            eps = (y - a * 0.7) / b
            strayed.append(eps[0])
            return a * eps - b * 0.7 if process is VELOCITY else eps

        sample(network, table, x)
        return np.ptp(strayed)

    assert wander("none") < 1e-12
    assert (wander("diffusers") > 1e-3) == (first < 9)


def test_windows_of_order_1_are_not_followed():
    table = build("dpm++2m", EPSILON, 12)
    a, b = table.A.copy(), table.B.copy()
    for row in (4, 8):  # the first rows of windows of 4, without what they remember
        b[row, 0] += a[row, 0, 1]
        a[row, 0, 1] = 0
    dropped = replace(table, A=a, B=b)
    x = np.random.default_rng(0).normal(size=(2, 5))

    def network(y, t):
        return np.tanh(y)

    plain = sample(network, table, x)
    assert np.abs(sample(network, dropped, x) - plain).max() > 1e-2
    assert np.abs(picard(network, table, x, window=4, tolerance=0).result - plain).max() < 1e-12


@pytest.mark.parametrize("name", names())
def test_compat_is_diffusers_or_none(name):
    if name in ("caf", "guided"):
        return
    with pytest.raises(UsageError, match=r"compat: 'diffuser' is none of diffusers, none\. Did you mean 'diffusers'\?"):
        build(f"{name}:compat=diffuser", EPSILON, 5)


def test_builders_check_compat_themselves():
    grid = Grid(np.arange(3), *variance_preserving(np.array([3.0, 2.0, 1.0, 0.0])))
    with pytest.raises(UsageError, match="dpm-solver: compat is 'diffusers' or None, not 'sd'"):
        dpm_solver(grid, compat="sd")
    assert follows("diffusers", defects.FIXED_STRIDE, solver="x")
    assert not follows(None, defects.FIXED_STRIDE, solver="x")
