"""Engines with a step cache: built for real, run over whole runs, and refused what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_net import PROCESS
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import hasten
from hasten.backends.engine import Engine
from hasten.errors import HastenError, UsageError

STEPS = 12
POLICY = "easycache:threshold=0.5,warmup=2"
OTHER = "easycache:threshold=0.4,warmup=2"


class Denoiser(nn.Module):
    """A stand-in for a model: what it returns changes slowly with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.into(x)) * (1 + timestep[:, None, None] / 1000))


def calls() -> list[dict[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 8, generator=noise)
    drift = torch.randn(2, 16, 8, generator=noise)
    return [{"x": x + 0.05 * i * drift, "timestep": torch.full((2,), 1000.0 - 80 * i)} for i in range(STEPS)]


def reference(mask: str) -> list[torch.Tensor]:
    """The same in eager: the last computed step's change, added to the input."""
    model, outputs, change = Denoiser().eval(), [], torch.zeros(())
    with torch.no_grad():
        for given, computes in zip(calls(), mask, strict=True):
            if computes == "1":
                change = model(**given) - given["x"]
            outputs.append(given["x"] + change)
    return outputs


@pytest.fixture(scope="module", params=[("onnxruntime:cpu", None), ("aoti:cpu", None), ("aoti:cpu", "straight")])
def engine(request: Any, tmp_path_factory: Any) -> Engine:
    target, form = request.param
    out = tmp_path_factory.mktemp("engines") / "cached"
    return hasten.build(
        Denoiser().eval(), target=target, out=out, example_kwargs=calls()[0], cache=POLICY, cache_form=form
    )


def run(engine: Engine, **options: Any) -> tuple[list[torch.Tensor], str]:
    begun = engine.start(STEPS, **options)
    outputs = [begun(**given)["output"] for given in calls()]
    return outputs, begun.mask


def test_a_run_is_what_its_mask_says(engine: Engine) -> None:
    outputs, mask = run(engine)
    assert mask[:2] == "11"
    assert mask[-1] == "1"
    assert "0" in mask
    for found, wanted in zip(outputs, reference(mask), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_the_threshold_is_a_matter_of_the_run(engine: Engine) -> None:
    assert run(engine, threshold=1e-6)[1] == "1" * STEPS
    assert run(engine, threshold=100.0)[1].count("1") == 3
    assert run(engine, threshold=100.0, limit=1)[1] == "110101010101"


def test_a_mask_is_a_matter_of_the_run(engine: Engine) -> None:
    outputs, mask = run(engine, mask="101001000001")
    assert mask == "101001000001"
    for found, wanted in zip(outputs, reference(mask), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_runs_and_branches_know_nothing_of_each_other(engine: Engine) -> None:
    alone, _ = run(engine)
    first, second = engine.start(STEPS), engine.start(STEPS)
    for given, wanted in zip(calls(), alone, strict=True):
        other = {**given, "x": -3 * given["x"]}
        second(**other)
        first(branch="unconditional", **other)
        torch.testing.assert_close(first(**given)["output"], wanted, rtol=0, atol=0)
    assert set(first.masks) == {"", "unconditional"}


def test_numpy_runs_the_same(engine: Engine) -> None:
    wanted, mask = run(engine)
    begun = engine.start(STEPS)
    for given, result in zip(calls(), wanted, strict=True):
        found = begun(**{name: value.numpy() for name, value in given.items()})["output"]
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, result.numpy(), rtol=2e-5, atol=2e-5)
    assert begun.mask == mask


def test_a_loaded_engine_runs_the_same(engine: Engine) -> None:
    assert run(hasten.load(engine.path))[1] == run(engine)[1]


def test_the_manifest_says_what_is_carried(engine: Engine) -> None:
    cache = engine.manifest.cache
    assert cache is not None
    assert cache["policy"].startswith("easycache:threshold=0.5")
    assert cache["state_bytes"] == sum(s["bytes"] for s in engine.manifest.state)
    sizes = {s["name"]: s["shape"] for s in engine.manifest.state}
    assert sizes["cache_residual"] == [2, 16, 8]


def test_refusals_of_a_run(engine: Engine) -> None:
    with pytest.raises(UsageError, match="a run of 0 was asked for; give at least 1"):
        engine.start(0)
    with pytest.raises(UsageError, match="3 decisions for a run of 12 steps; give one a step"):
        engine.start(STEPS, mask="101")
    with pytest.raises(UsageError, match="mask: '12' given; give 1 "):
        engine.start(2, mask="12")
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"threshold: {wrong} (was given; it goes from 0|is not a number)"):
            engine.start(STEPS, threshold=wrong)
    with pytest.raises(UsageError, match="limit: -5 was given; it goes from -1"):
        engine.start(STEPS, limit=-5)
    begun = engine.start(1)
    begun(**calls()[0])
    with pytest.raises(UsageError, match="the run has 1 steps and branch '' had them all; start another run"):
        begun(**calls()[1])
    begun = engine.start(STEPS)
    with pytest.raises(UsageError, match="there is no input 'time'"):
        begun(x=calls()[0]["x"], time=calls()[0]["timestep"])


def test_a_run_that_was_interrupted_goes_on(engine: Engine, tmp_path: Path) -> None:
    wanted, mask = run(engine)
    begun = engine.start(STEPS)
    for given in calls()[:5]:
        begun(**given)
    torch.save(begun.pause(), tmp_path / "paused.pt")
    again = hasten.load(engine.path).start(STEPS)
    again.resume(torch.load(tmp_path / "paused.pt", weights_only=True))
    for given, result in zip(calls()[5:], wanted[5:], strict=True):
        torch.testing.assert_close(again(**given)["output"], result, rtol=0, atol=0)
    assert again.mask == mask


def test_state_of_another_engine_is_refused(engine: Engine, tmp_path: Path) -> None:
    other = hasten.build(
        Denoiser().eval(), target="onnxruntime:cpu", out=tmp_path / "other", example_kwargs=calls()[0], cache=OTHER
    )
    begun = other.start(STEPS)
    begun(**calls()[0])
    paused = begun.pause()
    with pytest.raises(
        UsageError, match=r"the paused run is of another engine \(.*\), and its state means nothing here"
    ):
        engine.start(STEPS).resume(paused)
    with pytest.raises(UsageError, match="the paused run has 12 steps, and this one 9; start it with as many"):
        other.start(9).resume(paused)
    with pytest.raises(UsageError, match=r"the paused run is not whole; give what CachedRun\.pause returned"):
        other.start(STEPS).resume({"engine": paused["engine"]})


def test_a_branch_that_comes_late_or_comes_back_is_refused(engine: Engine) -> None:
    begun, given = engine.start(STEPS), calls()
    begun(branch="with", **given[0])
    begun(branch="without", **given[0])
    begun(branch="with", **given[1])
    begun(branch="with", **given[2])
    with pytest.raises(UsageError, match="branch 'without' is at step 1, and branch 'with' has done 3; branches take"):
        begun(branch="without", **given[1])
    with pytest.raises(UsageError, match="branch 'third' is at step 0, and branch 'with' has done 3"):
        begun(branch="third", **given[0])
    assert begun.masks.keys() == {"with", "without"}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps(engine: Engine, steps: int) -> None:
    begun = engine.start(steps)
    outputs = [begun(**given)["output"] for given in calls()[:steps]]
    assert begun.mask == "1" * steps  # two of warm-up, and the last
    for found, wanted in zip(outputs, reference("1" * STEPS), strict=False):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_a_threshold_that_does_nothing_is_told_with_the_mask(engine: Engine, caplog: Any) -> None:
    run(engine, threshold=1e-6)
    assert f"threshold 1e-06 never lets a call reuse: easycache only costs time; raise it (mask {'1' * STEPS})" in (
        caplog.text
    )
    caplog.clear()
    run(engine, threshold=100.0)
    assert "threshold 100 is never reached: all 9 calls" in caplog.text
    caplog.clear()
    run(engine)
    run(engine, mask="1" * STEPS)
    assert not caplog.records


def test_the_state_is_as_large_as_was_told(engine: Engine) -> None:
    begun = engine.start(STEPS)
    begun(**calls()[0])
    held = begun.state()
    assert set(held) == {s["name"] for s in engine.manifest.state}
    assert sum(value.nbytes for value in held.values()) == engine.manifest.cache["state_bytes"]


def test_a_calibration_of_another_model_or_size_is_refused(tmp_path: Path) -> None:
    def build(source: Any, **options: Any) -> None:
        hasten.build(source, target="onnxruntime:cpu", out=tmp_path / "none", **options)

    path = tmp_path / "mask.json"
    content = {"policy": "mask", "options": {"bits": "1010", "granularity": "output"}, "steps": 4}
    path.write_text(json.dumps({**content, "model": "scenes-unet", "shape": [2, 12, 16, 16]}))
    with pytest.raises(UsageError, match="is of the model 'scenes-unet', and this is 'scenes-dit'; calibrate this one"):
        build("scenes-dit", cache=str(path))
    with pytest.raises(UsageError, match="is for inputs of 2x12x16x16, and these are 1x16x8; calibrate this one"):
        build(Denoiser().eval(), cache=str(path), example_kwargs=calls()[0])
    path.write_text(json.dumps({**content, "shape": [2, 16, 8]}))
    engine = hasten.build(
        Denoiser().eval(), target="onnxruntime:cpu", out=tmp_path / "fits", cache=str(path), example_kwargs=calls()[0]
    )
    with pytest.raises(UsageError, match="mask: it was made for 4 steps and the run has 12"):
        engine.start(STEPS)
    path.write_text(path.read_text()[:30])
    with pytest.raises(UsageError, match=r"calibration file .* is not JSON"):
        build(Denoiser().eval(), cache=str(path), example_kwargs=calls()[0])
    assert not (tmp_path / "none").exists()


def test_a_calibration_of_another_number_of_steps_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    content = {"policy": "mask", "options": {"bits": "1010", "granularity": "output"}, "steps": 4}
    sampling = hasten.Sampling(steps=6, process=PROCESS)

    def build(name: str, sampling: hasten.Sampling) -> Engine:
        given = {"target": "onnxruntime:cpu", "out": tmp_path / name, "example_kwargs": calls()[0]}
        return hasten.build(Denoiser().eval(), cache=str(path), sampling=sampling, **given)

    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"mask\.json is for 4 steps, and the run has 6; run as many, or calibrate"):
        build("none", sampling)
    # Heun's solver asks the network twice a step, but for the last.
    with pytest.raises(UsageError, match="is for 4 steps, and the run has 7"):
        build("none", replace(sampling, steps=4, solver="heun"))
    assert not (tmp_path / "none").exists()
    assert hasten.sampler(build("fits", replace(sampling, steps=4))).engine.manifest.loop is not None
    path.write_text(json.dumps({**content, "options": {**content["options"], "stretch": "nearest"}}))
    assert build("stretched", sampling).manifest.loop is not None


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "aoti:cpu", "tensorrt-rtx:sm89"])
def test_a_graph_without_a_region_is_refused_for_every_target(target: str, tmp_path: Path) -> None:
    if target.startswith("tensorrt"):
        pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    given = {"target": target, "out": tmp_path / "none", "example_kwargs": calls()[0]}
    with pytest.raises(HastenError, match="teacache finds nothing to skip in this graph: no residual stream with"):
        hasten.build(Denoiser().eval(), cache="teacache:threshold=1,coefficients=1/0", **given)
    assert not (tmp_path / "none").exists()


def test_a_graph_without_a_region_is_refused_by_torch_compile() -> None:
    torch._dynamo.reset()
    model = torch.compile(Denoiser().eval(), backend="hasten", options={"cache": "first-block:threshold=1"})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="first-block finds nothing to skip in this graph"):
        model(**calls()[0])


def test_nan_in_an_input_is_refused_and_costs_no_step(engine: Engine) -> None:
    begun = engine.start(STEPS)
    given = calls()[0]
    with pytest.raises(UsageError, match="'x': 256 of 256 values are NaN"):
        begun(**{**given, "x": given["x"] * np.nan})
    assert begun.mask == ""
    begun(**given)
    assert begun.mask == "1"


def test_sizes_that_change_in_a_run(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    engine = hasten.build(
        Denoiser().eval(),
        target="onnxruntime:cpu",
        out=tmp_path / "dynamic",
        example_kwargs=calls()[0],
        dynamic_shapes={"x": {0: batch}, "timestep": {0: batch}},
        cache=POLICY,
    )
    begun = engine.start(STEPS)
    small = {name: value[:1] for name, value in calls()[0].items()}
    begun(**small)
    assert tuple(begun.state()["cache_residual"].shape) == (1, 16, 8)
    with pytest.raises(UsageError, match=r"input 'x' is .*2.* and was .*1.* when the run began"):
        begun(**calls()[1])


def test_a_build_is_refused_with_the_reason(tmp_path: Path) -> None:
    def build(**options: Any) -> None:
        given = {"target": "onnxruntime:cpu", "out": tmp_path / "none", "example_kwargs": calls()[0], **options}
        hasten.build(Denoiser().eval(), **given)

    with pytest.raises(UsageError, match=r"no step-cache policy named 'easycash'.*easycache"):
        build(cache="easycash:threshold=1")
    with pytest.raises(UsageError, match="cache form 'branch' is none of conditional, straight"):
        build(cache=POLICY, cache_form="branch")
    with pytest.raises(UsageError, match="region '0:3' was given without a cache"):
        build(region="0:3")
    with pytest.raises(UsageError, match="easycache does not skip a row of blocks; leave the region out"):
        build(cache=POLICY, region="0:3")
    assert not (tmp_path / "none").exists()


def test_an_engine_without_a_cache(tmp_path: Path) -> None:
    engine = hasten.build(
        Denoiser().eval(), target="onnxruntime:cpu", out=tmp_path / "plain", example_kwargs=calls()[0]
    )
    with pytest.raises(UsageError, match="engine 'plain' has no step cache; build it with a cache"):
        engine.start(3)
