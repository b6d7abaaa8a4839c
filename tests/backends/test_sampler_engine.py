"""Engines that hold a whole sampler: the pictures of a Python loop, for any solver, without another compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_net import LABELS, NEGATIVE, PROCESS, SHAPE, Net, eager, examples, loop_of, table, unit_noise

import hasten
from hasten.backends.engine import Engine
from hasten.backends.sampler import Sampler
from hasten.errors import UsageError
from hasten.passes.fx.counter_noise import normal
from hasten.passes.solvers import catalog
from hasten.passes.solvers.catalog import parse
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.start import levels
from hasten.passes.solvers.table import SolverTable

ROWS = 40
SOLVERS = ("ddim", "pndm", "plms", "dpm++2m-karras", "dpm++3m", "dpm++2s", "unipc", "deis", "lms", "euler", "heun")
TOLD = {"class_labels": LABELS, "negative_class_labels": NEGATIVE}


def built(tmp_path_factory: Any, target: str, batch: int, cache: str | None = None, **options: Any) -> Engine:
    return hasten.build(
        Net().eval(),
        target=target,
        out=tmp_path_factory.mktemp("engines") / "sampler",
        example_kwargs=examples(batch),
        cache=cache,
        sampling=hasten.Sampling(steps=6, guidance=3.0, rows=ROWS, process=PROCESS, **options),
    )


@pytest.fixture(scope="module", params=["onnxruntime:cpu", "aoti:cpu"])
def full(request: Any, tmp_path_factory: Any) -> Sampler:
    """Batched and rescaled guidance, noise from outside, inpainting, a step cache."""
    cache = "easycache:threshold=0.05"
    engine = built(tmp_path_factory, request.param, 4, cache, noise="input", rescale=True, inpaint=True)
    return hasten.sampler(engine)


@pytest.fixture(scope="module", params=["onnxruntime:cpu", "aoti:cpu"])
def sequential(request: Any, tmp_path_factory: Any) -> Sampler:
    """Two calls a row, and noise that the engine makes."""
    return hasten.sampler(built(tmp_path_factory, request.param, 2, form="sequential", noise="seed"))


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: Any) -> Engine:
    """The same network with its step cache, to be called by a Python loop."""
    return hasten.build(
        Net().eval(),
        target="onnxruntime:cpu",
        out=tmp_path_factory.mktemp("engines") / "step",
        example_kwargs=examples(4),
        cache="easycache:threshold=0.05",
    )


def run(sampler: Sampler, solver: Any, steps: int = 6, **options: Any) -> Any:
    found = table(solver, steps) if isinstance(solver, str) else solver
    noise = unit_noise(1 + len(found.noisy))
    if sampler.loop["noise"] == "input":
        options["noise"] = noise[1:]
    if sampler.loop["cache"] is not None:
        options.setdefault("mask", "1" * len(found))
    return sampler(solver=found, latents=noise[0], **TOLD, **options)


@pytest.mark.parametrize("solver", [*SOLVERS, "euler-ancestral", "dpm++2m-sde"])
def test_every_solver_makes_the_pictures_of_a_python_loop(full: Sampler, solver: str) -> None:
    expected = eager(table(solver, 6), scale=3.0)
    torch.testing.assert_close(run(full, solver).latents, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_one_engine_serves_solvers_and_steps_without_compiling(full: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", refuse)
    monkeypatch.setattr("torch._dynamo.convert_frame.compile_frame", refuse)
    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    for solver, steps in (("ddim", 1), ("unipc", 3), ("ddim", ROWS), ("pndm", 4)):
        expected = eager(table(solver, steps), scale=3.0)
        torch.testing.assert_close(
            run(full, solver, steps).latents, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max())
        )


def test_scale_and_rescale_are_inputs(full: Sampler) -> None:
    expected = eager(table("ddim", 6), scale=5.5, rescale=0.7)
    made = run(full, "ddim", guidance_scale=5.5, guidance_rescale=0.7)
    torch.testing.assert_close(made.latents, expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(made.latents, eager(table("ddim", 6), scale=5.5), atol=1e-2)


def test_chunks_make_the_same_picture_and_show_it_growing(full: Sampler) -> None:
    seen: list[Any] = []
    made = run(full, "unipc", 7, chunk=3, callback=seen.append)
    assert [(c.done, c.rows) for c in seen] == [(3, 7), (6, 7), (7, 7)]
    assert torch.equal(made.latents, run(full, "unipc", 7).latents)
    # the last row goes to no noise at all: its prediction is the picture
    torch.testing.assert_close(seen[-1].preview, made.latents, rtol=1e-4, atol=1e-4)


def test_previews_are_the_predicted_clean_sample(full: Sampler) -> None:
    found, seen = table("ddim", 6), list[Any]()
    run(full, found, chunk=1, callback=seen.append)
    clean, last = found.fold().clean, unit_noise(1)[0]
    for i, chunk in enumerate(seen):
        x, after = last, chunk.latents
        predicted = (after - float(found.fold().A[i, 0, 0]) * x) / float(found.fold().B[i, 0])
        expected = float(clean[i, 0]) * x + float(clean[i, 1]) * predicted
        torch.testing.assert_close(chunk.preview, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        last = after


def test_a_callback_ends_the_run(full: Sampler) -> None:
    def stop(chunk: Any) -> None:
        if chunk.done == 2:
            raise KeyboardInterrupt

    before = run(full, "ddim").latents
    with pytest.raises(KeyboardInterrupt):
        run(full, "ddim", chunk=1, callback=stop)
    assert torch.equal(run(full, "ddim").latents, before)


def test_the_step_cache_decides_in_the_loop(full: Sampler, one_step: Engine) -> None:
    """As it does when a Python loop calls an engine of one step."""
    found = table("ddim", 12)
    made = run(full, found, mask=None, threshold=0.3)
    assert "0" in made.decisions
    assert made.decisions.count("1") > 1
    cached = one_step.start(12, threshold=0.3)

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        given = {"sample": torch.cat([x, x]), "timestep": torch.full((4,), time)}
        told, untold = next(iter(cached(class_labels=torch.cat([LABELS, NEGATIVE]), **given).values())).chunk(2)
        return untold + 3.0 * (told - untold)

    expected = sample(denoise, found, unit_noise(1)[0])
    assert made.decisions == cached.mask
    torch.testing.assert_close(made.latents, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_a_forced_mask_holds(full: Sampler) -> None:
    assert run(full, "ddim", mask="110010").decisions == "110010"


def test_a_picture_is_begun_from_another(full: Sampler) -> None:
    found, image = table("ddim", 8), 0.3 * torch.ones(SHAPE)
    (noise,) = unit_noise(1)
    made = run(full, found, image=image, strength=0.5)
    time = int(found.time[4])
    bars = Process.of(PROCESS).bars
    assert bars is not None
    start = float(bars[time]) ** 0.5 * image + float(1 - bars[time]) ** 0.5 * noise
    expected = eager(_behind(found, 4), scale=3.0, start=start)
    torch.testing.assert_close(made.latents, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("solver", ["unipc", "dpm++2m", "dpm++2m-sde", "deis", "lms"])
def test_a_solver_with_a_memory_starts_anew_at_a_picture(full: Sampler, solver: str) -> None:
    image, asked = 0.3 * torch.ones(SHAPE), parse(solver)
    rest = asked.build(Process.of(PROCESS), 8, first=4)
    unit, *later = unit_noise(1 + len(rest.noisy))
    signal, noise = table(solver, 8).level[4]
    seen: list[Any] = []
    made = full(
        solver=solver,
        num_inference_steps=8,
        image=image,
        strength=0.5,
        latents=unit,
        noise=later,
        mask="1" * 8,
        chunk=3,
        callback=seen.append,
        **TOLD,
    )
    expected = eager(rest, scale=3.0, start=float(signal) * image + float(noise) * unit, noise=later)
    torch.testing.assert_close(made.latents, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
    assert [(c.done, c.rows) for c in seen] == [(7, 8), (8, 8)]


@pytest.mark.parametrize(
    ("solver", "process", "strength"),
    [("euler:sigmas=200/5/1/0.2", None, 1.0), ("flow-euler:invert=true", Process.flow(3.0), 0.5)],
)
def test_a_picture_begins_at_the_level_of_the_solvers_own_grid(
    full: Sampler, solver: str, process: Process | None, strength: float
) -> None:
    """Which is not that of the training at the times that the network is told."""
    found = catalog.build(solver, process or Process.of(PROCESS), 4)
    image, (unit,), row = 3.0 * torch.ones(SHAPE), unit_noise(1), 4 - int(4 * strength)
    signal, noise = found.level[row]
    expected = eager(_behind(found, row), scale=3.0, start=float(signal) * image + float(noise) * unit)
    made = run(full, found, image=image, strength=strength).latents
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def _behind(found: SolverTable, row: int) -> SolverTable:
    """The rows of a solver of one latent from ``row`` on, from a start that is as the network sees it."""
    columns = ("time", "input", "A", "B", "C", "cy", "cf", "clean", "direct", "condition", "network")
    return SolverTable(**{name: getattr(found, name)[row:] for name in columns}, output=found.output)


def test_a_step_cache_has_nothing_to_reuse_at_a_picture(full: Sampler, one_step: Engine) -> None:
    """The first row that is done computes, and the others do what the mask says of them in a whole run."""
    found, image, (unit,) = table("ddim", 8), 0.3 * torch.ones(SHAPE), unit_noise(1)
    made = run(full, found, image=image, strength=0.5, mask="00000101")
    assert made.decisions == "1101"
    cached = one_step.start(4, mask="1101")

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        given = {"sample": torch.cat([x, x]), "timestep": torch.full((4,), time)}
        told, untold = next(iter(cached(class_labels=torch.cat([LABELS, NEGATIVE]), **given).values())).chunk(2)
        return untold + 3.0 * (told - untold)

    signal, noise = found.level[4]
    expected = sample(denoise, _behind(found, 4), float(signal) * image + float(noise) * unit)
    torch.testing.assert_close(made.latents, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_a_threshold_that_does_nothing_is_told(full: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    """As of a run of an engine of one step."""
    for threshold, message in (
        (1e9, "is never reached"),
        (1e-9, "never lets a call reuse"),
        (0.0, "switches easycache"),
    ):
        caplog.clear()
        run(full, "ddim", 12, mask=None, threshold=threshold)
        assert [message in r.getMessage() for r in caplog.records] == [True]
    caplog.clear()
    run(full, table("ddim", 12), mask=None, threshold=0.3)
    run(full, "ddim", mask="111111", threshold=1e9)
    assert not caplog.records


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_inpainting_keeps_what_is_known_and_agrees_with_blending_after_every_step(full: Sampler, solver: str) -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    image = 0.5 * torch.ones(SHAPE)
    made = run(full, solver, image=image, mask_image=mask).latents
    assert torch.equal(made[..., :4], image[..., :4])
    free = run(full, solver).latents
    assert not torch.allclose(made[..., 4:], free[..., 4:], atol=1e-3)
    if solver == "ddim":
        level = levels(Process.of(PROCESS), table("ddim", 6).time)
        expected = blended_after_every_step(mask, image, table("ddim", 6), level)
        torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)


def test_inpainting_blends_at_the_levels_of_the_solvers_own_grid(full: Sampler) -> None:
    mask, image = (torch.arange(128) % 3 > 0).float().reshape(2, 1, 8, 8), 3.0 * torch.ones(SHAPE)
    found = table("euler:sigmas=200/5/1/0.2", 4)
    expected = blended_after_every_step(mask, image, found, found.level[:-1])
    made = run(full, found, image=image, mask_image=mask).latents
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def blended_after_every_step(mask: torch.Tensor, image: torch.Tensor, found: SolverTable, level: Any) -> torch.Tensor:
    """What diffusers' inpainting pipelines do to a one-latent solver."""
    net, (noise,) = Net().eval(), unit_noise(1)
    folded, x = found.fold(), found.init * noise
    with torch.no_grad():
        for i, time in enumerate(found.time.tolist()):
            known = float(level[i, 0]) * image + float(level[i, 1]) * noise
            x = mask * x + (1 - mask) * known
            t = torch.full((2,), time)
            told, untold = net(x, t, LABELS), net(x, t, NEGATIVE)
            x = float(folded.A[i, 0, 0]) * x + float(folded.B[i, 0]) * (untold + 3.0 * (told - untold))
    return mask * x + (1 - mask) * image


def test_sequential_guidance_is_the_same(sequential: Sampler) -> None:
    expected = eager(table("unipc", 6), scale=3.0)
    torch.testing.assert_close(run(sequential, "unipc").latents, expected, rtol=2e-5, atol=2e-5)


def test_noise_of_a_seed_is_the_same_everywhere(sequential: Sampler) -> None:
    found = table("euler-ancestral", 6)
    start = unit_noise(1)[0]
    drawn = [normal(torch.tensor(11), torch.tensor(row), start) for row in found.noisy]
    expected = eager(found, scale=3.0, start=start, noise=drawn)
    made = sequential(solver=found, latents=start, seed=11, **TOLD)
    torch.testing.assert_close(made.latents, expected, rtol=5e-5, atol=5e-5)
    again = sequential(solver=found, latents=start, seed=12, **TOLD)
    assert not torch.allclose(again.latents, made.latents, atol=1e-2)


def test_noise_is_drawn_as_diffusers_draws_it(sequential: Sampler) -> None:
    given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    expected = sequential(latents=given, **TOLD).latents
    made = sequential(generator=torch.Generator().manual_seed(5), **TOLD).latents
    assert torch.equal(made, expected)
    apart = [torch.Generator().manual_seed(n) for n in (5, 6)]
    assert not torch.equal(sequential(generator=apart, **TOLD).latents, expected)


def test_a_seed_for_each_picture_is_as_if_it_were_alone(full: Sampler, sequential: Sampler) -> None:
    several = sequential(seed=[3, 4], **TOLD).latents
    assert torch.equal(several[:1], sequential(seed=3, **TOLD).latents[:1])
    assert torch.equal(several[1:], sequential(seed=[9, 4], **TOLD).latents[1:])
    large = [full(seed=s, solver="euler-ancestral", **TOLD).latents for s in (2**41, 2**64 - 1, [2**41, 5])]
    assert len({float(z.sum()) for z in large}) == 3
    assert torch.equal(full(seed=2**41, solver="euler-ancestral", **TOLD).latents, large[0])
    with pytest.raises(UsageError, match="seed: 2 given, and the loop makes the noise of all pictures from one"):
        sequential(seed=[3, 4], solver="euler-ancestral", **TOLD)


def test_a_large_seed_makes_noise_in_the_engine(sequential: Sampler) -> None:
    start = unit_noise(1)[0]
    made = [
        sequential(solver="euler-ancestral", latents=start, seed=s, **TOLD).latents for s in (2**41, 2**63, 2**64 - 1)
    ]
    assert len({float(z.sum()) for z in made}) == 3


def test_no_seed_is_any_seed_as_in_diffusers(sequential: Sampler) -> None:
    torch.manual_seed(0)
    first, second = (sequential(seed=None, **TOLD).latents for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(sequential(seed=None, **TOLD).latents, first)


def test_arrays_and_lists_are_taken_as_tensors(full: Sampler) -> None:
    unit, mask, image = unit_noise(1)[0], torch.linspace(0, 1, 128).reshape(2, 1, 8, 8), 0.5 * torch.ones(SHAPE)
    given = {"latents": unit, "image": image, "mask_image": mask, **TOLD}
    expected = full(**given).latents
    assert torch.equal(full(**{name: value.numpy() for name, value in given.items()}).latents, expected)
    assert torch.equal(full(**{name: value.tolist() for name, value in given.items()}).latents, expected)


def test_a_callback_interrupts_as_in_diffusers(full: Sampler) -> None:
    seen: list[Any] = []

    def stop(pipe: Any, step: int, time: float, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"])
        pipe._interrupt = step == 2
        return given

    made = run(full, "ddim", callback_on_step_end=stop)
    assert len(seen) == 3
    assert torch.equal(made.latents, seen[-1])
    assert made.decisions == "111"
    assert run(full, "ddim").decisions == "111111"  # of another run it says nothing


def test_a_picture_depends_on_its_seed_and_place_alone(sequential: Sampler) -> None:
    one = sequential(seed=3, **TOLD).latents
    assert torch.equal(one, sequential(seed=3, **TOLD).latents)
    assert not torch.equal(one, sequential(seed=4, **TOLD).latents)


@pytest.mark.parametrize("full", ["onnxruntime:cpu"], indirect=True)  # a package of AOTInductor is code
def test_nothing_grows_with_the_number_of_steps(full: Sampler) -> None:
    """What a loop collects row by row would be an output of its node beyond what it carries."""
    _, node, body = loop_of(full.engine)
    assert len(node.output) == len(node.input) - 2 == len(body.output) - 1


@pytest.mark.parametrize("full", ["onnxruntime:cpu"], indirect=True)  # a package of AOTInductor is code
def test_the_arithmetic_of_the_solver_is_float32_without_matrix_products(full: Sampler) -> None:
    _, _, body = loop_of(full.engine)
    ours = [n for n in body.node if any(p.value == "solver-loop" for p in n.metadata_props)]
    assert len(ours) > 20
    assert {n.op_type for n in ours}.isdisjoint({"MatMul", "Gemm", "Einsum"})


def test_the_manifest_says_what_is_in_the_engine(full: Sampler) -> None:
    loop = hasten.load(full.engine.path).manifest.loop
    assert loop is not None
    assert (loop["solver"].partition(":")[0], loop["steps"], loop["rows"], loop["guidance"]) == (
        "ddim",
        6,
        ROWS,
        "batched",
    )
    assert loop["cache"]["form"] == "conditional"
    assert loop["latents"] == list(SHAPE)
    assert hasten.sampler(str(full.engine.path)).loop == loop
