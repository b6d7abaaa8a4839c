"""Clipping and thresholding, in numpy and torch, and where the loop applies them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.catalog import build, names, parse
from hasten.passes.solvers.hooks import Clip, Threshold
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample

V = Process.diffusion(prediction="v_prediction")


def test_threshold_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.5)
    x0 = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 1.5, 4]).view(
        3, 1, 1, 1
    )
    wanted = theirs._threshold_sample(x0)
    assert torch.allclose(Threshold(0.9, 2.5)(x0), wanted, atol=1e-6)
    assert np.allclose(Threshold(0.9, 2.5)(x0.numpy()), wanted.numpy(), atol=1e-6)


def test_clip_bounds_values():
    assert Clip(0.5)(np.array([-2.0, 0.1, 3.0])).tolist() == [-0.5, 0.1, 0.5]
    assert Clip()(torch.tensor([-2.0, 0.1])).tolist() == pytest.approx([-1, 0.1])


TWO_NETWORKS = ("caf", "guided", "ltsp", "ltsp4", "stsp", "stsp4")


@pytest.mark.parametrize("name", [n for n in names() if n not in (*TWO_NETWORKS, "ipndm")])
def test_a_hook_that_changes_nothing_changes_nothing(name):
    process = Process.flow(3.0) if name.startswith("flow") else V
    # v of diffusers' PNDM is converted after mixing, so it says nothing of a row's own x0: take the published form
    table = build(f"{name}:compat=none", process, 8)
    noise = np.random.default_rng(0).normal(size=(len(table.noisy), 6))
    x = np.linspace(-1, 1, 6)
    seen = []

    def same(x0):
        seen.append(x0)
        return x0 + 0

    plain = sample(lambda y, t: np.tanh(y), table, x, noise=noise)
    hooked = sample(lambda y, t: np.tanh(y), table, x, noise=noise, hook=same)
    assert len(seen) == len(table)
    assert np.allclose(hooked, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm++2m", "unipc", "heun", "lms"])
def test_a_hook_sees_x0_and_replaces_it(name):
    """Whatever the network says, x0 is 0.5: the result is 0.5, with no noise left."""
    table = build(f"{name}:end=zero,compat=none" if name != "lms" else name, V, 9)
    result = sample(lambda y, t: np.tanh(y), table, np.linspace(-1, 1, 6), hook=lambda x0: x0 * 0 + 0.5)
    assert np.allclose(result, 0.5, atol=1e-9)


def test_caf_is_exact_for_a_constant_acceleration():
    velocity, acceleration = np.array([0.3, -1.0]), np.array([2.0, 0.7])
    start, calls = np.array([0.1, 0.2]), []

    def speed(y, t):
        calls.append(t)
        return velocity

    def push(y, t, v):
        assert np.array_equal(v, velocity)
        calls.append(t)
        return acceleration

    for steps in (1, 2, 7):
        calls.clear()
        end = sample([speed, push], caf(steps), start)
        assert np.allclose(end, start + velocity + acceleration / 2, rtol=1e-13)
        assert calls == pytest.approx([0, *(i / steps for i in range(steps))])
        assert len(calls) == steps + 1
        back = sample([speed, push], caf(steps, inverse=True), end)
        assert np.allclose(back, start, atol=1e-13)
    assert caf(3, fraction=1000).time.tolist() == [0, 0, 0.333, 0.666]


def test_stsp_without_a_guide_is_plms_of_its_order():
    stsp = build("stsp:order=4,weight=1", Process.diffusion(), 9)
    lms = build("lms:order=1", Process.diffusion(), 9)
    eps_alone = sample([lambda y, t: np.tanh(y), lambda y, t: y * 0], stsp, np.ones(3))
    first = sample(
        [lambda y, t: np.tanh(y), lambda y, t: y * 0], build("stsp:order=1", Process.diffusion(), 9), np.ones(3)
    )
    assert np.allclose(first, sample(lambda y, t: np.tanh(y), lms, np.ones(3)), rtol=1e-12)
    assert not np.allclose(eps_alone, first, rtol=1e-4)
    assert (stsp.network == 0).sum() == 9
    assert (stsp.network == 1).sum() == 17  # twice a step; at the end without noise it has no say


@pytest.mark.parametrize("text", ["ddim:clip=0.5,keep_eps=true", "dpm++2m:threshold=0.9,largest=2", "unipc:clip=0.7"])
def test_a_table_brings_its_hook(text):
    hook = Clip(float(text.partition("clip=")[2].partition(",")[0])) if "clip" in text else Threshold(0.9, 2.0)
    table, x = build(text, V, 6), 3 * np.random.default_rng(1).normal(size=(2, 6))
    assert table.hook == hook
    assert build(str(parse(text)), V, 6).hook == hook
    made = sample(lambda y, t: np.tanh(y), table, x)
    bare = replace(table, hook=None)
    assert np.array_equal(made, sample(lambda y, t: np.tanh(y), bare, x, hook=hook))
    assert not np.allclose(made, sample(lambda y, t: np.tanh(y), bare, x))
    assert np.array_equal(made, picard(lambda y, t: np.tanh(y), table, x, window=6, tolerance=0).result)
    assert build(text.partition(":")[0] + ":clip=inf", V, 6).hook is None


@pytest.mark.parametrize("name", ["ddim", "ddim:keep_eps=true", "dpm-2m", "unipc", "heun", "dpm++2m-sde"])
def test_a_solver_of_x0_is_the_same_solver(name):
    """What a compiled loop is given, with x0 as it is."""
    table = build(name, V, 6)
    on_x0, gain = table.on_x0()
    for i in range(len(table)):
        f, y = np.full(1, 0.3), np.full(1, -0.8)
        x0 = on_x0.clean[i] @ np.concatenate([y, f])
        state = np.concatenate([y, np.full(table.width - 1, 0.2)])
        folded = table.fold()
        expected = folded.A[i] @ state + folded.B[i] * f
        assert np.allclose(on_x0.A[i] @ state + on_x0.B[i] * f + gain[i] * x0, expected, rtol=1e-9, atol=1e-12)
