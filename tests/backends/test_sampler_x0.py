"""Clipping and dynamic thresholding inside compiled loops: the pictures of a Python loop, and of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from loop_net import LABELS, PROCESS, SHAPE, Net, examples, loop_of, unit_noise

import hasten
from hasten.backends.sampler import Sampler
from hasten.errors import UsageError
from hasten.passes.solvers import catalog
from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.hooks import Clip
from hasten.passes.solvers.loop import padded
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample

STEPS = 8
CLIP, THRESHOLD = "ddim:clip=0.8,keep_eps=true", "dpm++2m:threshold=0.9,largest=3"
AOTI = pytest.param("aoti:cpu", marks=pytest.mark.slow)
TARGETS = ("onnxruntime:cpu", AOTI)


def built(folder: Any, target: str, solver: str | None = None, batch: int = 2, **options: Any) -> Sampler:
    engine = hasten.build(
        Net().eval(),
        target=target,
        out=folder / "sampler",
        example_kwargs=examples(batch),
        sampling=hasten.Sampling(solver, STEPS, rows=20, **{"process": PROCESS, **options}),
    )
    return hasten.sampler(engine)


def config(name: str, **options: Any) -> dict[str, Any]:
    """What diffusers' scheduler of this name writes."""
    diffusers = pytest.importorskip("diffusers")
    return {"_class_name": name, **getattr(diffusers, name)(**PROCESS, **options).config}


@pytest.fixture(scope="module", params=TARGETS)
def clipping(request: Any, tmp_path_factory: Any) -> Sampler:
    """Built for the solver of diffusers' own configuration."""
    process = config("DDIMScheduler", clip_sample_range=0.8)
    return built(tmp_path_factory.mktemp("clip"), request.param, process=process)


@pytest.fixture(scope="module", params=TARGETS)
def thresholding(request: Any, tmp_path_factory: Any) -> Sampler:
    given = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
    process = config("DPMSolverMultistepScheduler", **given)
    return built(tmp_path_factory.mktemp("threshold"), request.param, process=process)


def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
    made: torch.Tensor = Net().eval()(x, torch.full((len(x),), time), LABELS)
    return made


def on_the_host(solver: str, hook: Callable[[Any], Any] | None = None) -> torch.Tensor:
    table = catalog.build(solver, Process.of(PROCESS), STEPS)
    first, *later = unit_noise(1 + len(table.noisy))
    with torch.no_grad():
        made: torch.Tensor = sample(denoise, table, first, noise=later, hook=hook)
    return made


def by_diffusers(scheduler: Any, steps: int = STEPS) -> torch.Tensor:
    (x,) = unit_noise(1)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for time in scheduler.timesteps:
            x = scheduler.step(denoise(x, float(time)), time, x).prev_sample
    return x


def run(sampler: Sampler, solver: str | None = None, **options: Any) -> Any:
    return sampler(solver=solver, latents=unit_noise(1)[0], class_labels=LABELS, **options)


def same(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5 * max(1, float(expected.abs().max())))


@pytest.mark.parametrize(
    "solver", [CLIP, "ddim:clip=1.5", "dpm++2m:clip=1", "dpm-2m:clip=1", "unipc:clip=1", "heun:clip=1", "lms:clip=0.7"]
)
def test_clipping_of_every_kind_of_solver(clipping: Sampler, solver: str) -> None:
    expected = on_the_host(solver)
    assert not torch.allclose(expected, on_the_host(f"{solver.partition(':')[0]}"), atol=1e-2)
    same(run(clipping, solver).latents, expected)


@pytest.mark.parametrize(
    "solver",
    [
        THRESHOLD,
        "ddim:threshold=0.995,largest=2.5,keep_eps=true",
        "dpm++2m:threshold=0.9",
        "dpm++3m:threshold=1,largest=2",
        "unipc:threshold=0.95,largest=inf",
        "dpm-2m:threshold=0.97,largest=1.5",
    ],
)
def test_thresholding_of_every_kind_of_solver(thresholding: Sampler, solver: str) -> None:
    expected = on_the_host(solver)
    assert not torch.allclose(expected, on_the_host(solver.partition(":")[0]), atol=1e-2)
    same(run(thresholding, solver).latents, expected)


def test_clipping_is_that_of_diffusers(clipping: Sampler) -> None:
    diffusers = pytest.importorskip("diffusers")
    expected = by_diffusers(diffusers.DDIMScheduler(**PROCESS, clip_sample=True, clip_sample_range=0.8))
    assert not torch.allclose(expected, by_diffusers(diffusers.DDIMScheduler(**PROCESS, clip_sample=False)), atol=1e-2)
    same(run(clipping).latents, expected)
    same(run(clipping, CLIP).latents, expected)


@pytest.mark.parametrize("ratio", [0.9, 0.9951, 1.0])
def test_thresholding_is_that_of_diffusers(thresholding: Sampler, ratio: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    given = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": 3.0}
    expected = by_diffusers(diffusers.DPMSolverMultistepScheduler(**PROCESS, **given))
    same(run(thresholding, f"dpm++2m:threshold={ratio},largest=3").latents, expected)
    if ratio == 0.9:
        same(run(thresholding).latents, expected)
    expected = by_diffusers(diffusers.DDIMScheduler(**PROCESS, **given))
    same(run(thresholding, f"ddim:threshold={ratio},largest=3,keep_eps=true").latents, expected)


def test_other_solvers_keep_the_configurations_hook(clipping: Sampler, thresholding: Sampler) -> None:
    """Unless they say something else, or nothing (``clip=inf``)."""
    same(run(clipping, "unipc").latents, on_the_host("unipc:clip=0.8"))
    same(run(thresholding, "unipc").latents, on_the_host("unipc:threshold=0.9,largest=3"))
    same(run(clipping, "unipc:clip=0.5").latents, on_the_host("unipc:clip=0.5"))


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "unipc"])
def test_solvers_that_leave_x0_run_in_the_same_engine(clipping: Sampler, thresholding: Sampler, solver: str) -> None:
    for sampler in (clipping, thresholding):
        same(run(sampler, f"{solver}:clip=inf").latents, on_the_host(solver))


def test_chunks_and_previews(clipping: Sampler, thresholding: Sampler) -> None:
    """A preview is what the solver goes on with."""
    for sampler, bound in ((clipping, 0.8), (thresholding, 1.0)):
        seen: list[Any] = []
        made = run(sampler, chunk=3, callback=seen.append)
        assert torch.equal(made.latents, run(sampler).latents)
        assert len(seen) == 3
        assert all(float(c.preview.abs().max()) == pytest.approx(bound) for c in seen)
    free: list[Any] = []
    run(clipping, "ddim:clip=inf", chunk=3, callback=free.append)
    assert float(free[0].preview.abs().max()) > 1.5


@pytest.mark.slow
def test_guidance_and_noise_go_with_it(tmp_path: Any) -> None:
    """x0 is that of the guided prediction."""
    guided_by = {"guidance": 3.0, "noise": "input"}
    sampler = built(tmp_path, "onnxruntime:cpu", "ddim:eta=0.5,clip=1", 4, **guided_by)
    table = catalog.build("ddim:eta=0.5,clip=1", Process.of(PROCESS), STEPS)
    first, *later = unit_noise(1 + len(table.noisy))
    negative = torch.full((2,), 9)

    def guided(x: torch.Tensor, time: float) -> torch.Tensor:
        net, t = Net().eval(), torch.full((2,), time)
        told, untold = net(x, t, LABELS), net(x, t, negative)
        return untold + 3.0 * (told - untold)

    with torch.no_grad():
        expected = sample(guided, table, first, noise=later)
    given = {"class_labels": LABELS, "negative_class_labels": negative}
    same(sampler(latents=first, noise=later, **given).latents, expected)


@pytest.mark.parametrize("thresholding", ["onnxruntime:cpu"], indirect=True)  # a package of AOTInductor is code
def test_a_threshold_puts_as_few_values_in_order_as_it_can(thresholding: Sampler) -> None:
    graph, _, body = loop_of(thresholding.engine)
    (top,) = (n for n in body.node if n.op_type == "TopK")
    known = {t.name: onnx.numpy_helper.to_array(t) for t in (*graph.initializer, *body.initializer)}
    assert int(known[top.input[1]].item()) == math.prod(SHAPE[1:]) - math.floor(0.9 * (math.prod(SHAPE[1:]) - 1))


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("ddim:clip=1", "the solver asks to clip x0, and the loop was built to leave it as it is; build it with"),
        ("ddim:threshold=0.995", "the solver asks to threshold x0, and the loop was built to leave it"),
    ],
)
def test_a_loop_without_a_hook_refuses_one(solver: str, message: str) -> None:
    table = catalog.build(solver, Process.of(PROCESS), STEPS)
    with pytest.raises(UsageError, match=message):
        padded(table, 20, 6)


def test_engines_refuse_what_they_do_not_hold(clipping: Sampler, thresholding: Sampler) -> None:
    with pytest.raises(UsageError, match="asks to threshold x0, and the loop was built to clip it"):
        run(clipping, "ddim:threshold=0.995")
    with pytest.raises(UsageError, match="asks to clip x0, and the loop was built to threshold it"):
        run(thresholding, "ddim:clip=1")
    with pytest.raises(
        UsageError,
        match=r"thresholds at the quantile 0.5, and the engine finds none below 0.9; build it for that .*threshold=0.5",
    ):
        run(thresholding, "ddim:threshold=0.5")
    with pytest.raises(UsageError, match="row 0 of the solver says nothing about x0"):
        replace(caf(2), hook=Clip()).on_x0()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddim:clip=0"}, "clip: the limit is 0; it must be positive"),
        ({"solver": "ddim:clip=-1"}, "ddim: clip: -1 was given; it goes from 0"),
        ({"solver": "ddim:clip=1,threshold=0.9"}, "clip and threshold are two ways .*; take one"),
        ({"solver": "ddim:largest=2"}, "largest bounds the threshold, and there is none"),
        ({"solver": "ddim:threshold=1.5"}, "ddim: threshold: 1.5 was given; it goes from 0 to 1"),
        ({"solver": "ddim:threshold=0.9,largest=0.5"}, "ddim: largest: 0.5 was given; it goes from 1"),
        ({"solver": "stsp:clip=1"}, "stsp has no option 'clip'"),
        ({"solver": "guided:solver=ddim:clip=1"}, "guided: clip keeps x0 in its range, .*; leave one out"),
        (
            {"solver": "stsp", "process": {**PROCESS, "clip_sample": True}},
            "the scheduler's configuration clips x0, which stsp cannot; take another solver, or set clip_sample to",
        ),
        (
            {"solver": "caf", "process": {**PROCESS, "thresholding": True}},
            "configuration thresholds x0, which caf cannot; .* set thresholding to false in it",
        ),
    ],
)
def test_a_hook_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hasten.Sampling(**{"process": PROCESS, **options}).table()


def test_tensorrt_orders_no_more_than_it_can(tmp_path: Any) -> None:
    """64 by 64 latents of four channels in a loop whose threshold is the median."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    given = {**examples(1), "sample": torch.zeros(1, 4, 64, 64)}
    with pytest.raises(
        UsageError, match=r"needs a picture's 8193 largest values in order, and TopK takes at most 3840"
    ):
        hasten.build(
            Net().eval(),
            target="tensorrt-rtx:sm89",
            out=tmp_path / "plan",
            example_kwargs=given,
            sampling=hasten.Sampling("ddim:threshold=0.5", STEPS, process=PROCESS),
        )
    assert not (tmp_path / "plan").exists()


@pytest.mark.slow
@pytest.mark.parametrize("solver", [CLIP, THRESHOLD])
def test_plans_hold_both(tmp_path: Any, solver: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    engine = hasten.build(
        Net().eval(),
        target="tensorrt-rtx:sm89",
        out=tmp_path / "plan",
        example_kwargs=examples(2),
        sampling=hasten.Sampling(solver, STEPS, process=PROCESS),
    )
    assert engine.manifest.audit is not None
    assert engine.manifest.audit["layers"].get("TOPK", 0) == (solver == THRESHOLD)
    assert engine.manifest.audit["behind_jumps"]["corrltn"] == 2
