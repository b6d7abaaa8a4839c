"""What a sampler's engine cannot mean is one sentence, when it is built and when it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_net import LABELS, NEGATIVE, PROCESS, SHAPE, Net, examples
from torch import nn

import hasten
from hasten.errors import UsageError

TOLD = {"class_labels": LABELS, "negative_class_labels": NEGATIVE}


def build(out: Path, *, target: str = "onnxruntime:cpu", net: nn.Module | None = None, **options: Any) -> Any:
    given = options.pop("given", examples(options.pop("batch", 4)))
    cache = {key: options.pop(key) for key in ("cache", "cache_form") if key in options}
    options = {"process": PROCESS, "steps": 6, "rows": 8, **options}
    return hasten.build(
        net or Net().eval(), target=target, out=out, example_kwargs=given, sampling=hasten.Sampling(**options), **cache
    )


@pytest.fixture(scope="module")
def guided(tmp_path_factory: Any) -> Any:
    engine = build(tmp_path_factory.mktemp("engines") / "guided", guidance=3.0, history=2)
    return hasten.sampler(engine)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Any:
    return hasten.sampler(build(tmp_path_factory.mktemp("engines") / "plain", batch=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 9}, "the solver makes 9 evaluations and the loop takes at most 8"),
        ({"solver": "heun", "num_inference_steps": 5}, "the solver makes 9 evaluations"),
        ({"solver": "unipc"}, "the solver carries 3 latents and the loop has room for 2"),
        ({"solver": "ddmi"}, "no solver named 'ddmi'.* Did you mean 'ddim'"),
        (
            {"solver": "euler-ancestral"},
            "adds noise in 5 of 6 rows, and the engine was built for solvers that add none",
        ),
        ({"noise": []}, "noise was given to an engine whose noise is 'none'"),
        ({"class_label": LABELS}, "the sampler takes no 'class_label'.* Did you mean 'class_labels'"),
        ({"guidance_rescale": 0.7}, "guidance_rescale was given to an engine without it"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents is \(1, 4, 8, 8\), and the engine makes \(2, 4, 8, 8\)"),
        ({"generator": [torch.Generator()]}, "1 generators were given for 2 pictures"),
        ({"seed": -1}, "seed: -1 given; give 0 or more"),
        ({"strength": 0.5}, "strength and mask_image say how much of an image is made anew; give the image"),
        ({"image": torch.zeros(SHAPE), "strength": 1.5}, "strength: 1.5 given"),
        ({"image": torch.zeros(SHAPE), "strength": 0.01}, "strength 0.01 of 6 steps is none"),
        (
            {"image": torch.zeros(SHAPE), "solver": "heun", "num_inference_steps": 4, "strength": 0.5},
            "heun cannot start at step 2: its start is fixed; those that can: .*unipc",
        ),
        ({"image": torch.zeros(SHAPE), "strength": "a"}, "strength: 'a' given, which is not one number"),
        (
            {"image": torch.zeros(SHAPE), "mask_image": torch.zeros(2, 1, 8, 8)},
            "mask_image was given to an engine that cannot inpaint",
        ),
        ({"threshold": 0.1}, "has no step cache"),
        ({"chunk": 0}, "chunk: 0 given; give 1 or more"),
        ({"chunk": 1.5}, "chunk: 1.5 is not a whole number; give 1 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 given; give 1 or more"),
        ({"num_inference_steps": -2}, "num_inference_steps: -2 given; give 1 or more"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: 2.5 is not a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps: True is not a whole number"),
        ({"solver": 3}, "solver: 3 is neither a solver's name nor a SolverTable"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"seed": 2**64}, "seed: 18446744073709551616 given; give 0 or more, up to"),
        ({"seed": [1, 2, 3]}, "3 seeds were given for 2 pictures; give one, or one each"),
        ({"seed": [1, -2]}, "seed: -2 given; give 0 or more"),
        ({"generator": 3}, "generator: 3 is no torch.Generator; give one, or a list"),
        ({"generator": [1, 2]}, "generator: 1 is no torch.Generator"),
        ({"guidance_scale": -2.0}, "guidance_scale: -2 given; give a finite number from 0 up"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan given; give a finite number from 0 up"),
        ({"guidance_scale": float("inf")}, "guidance_scale: inf given; give a finite number from 0 up"),
        ({"guidance_scale": "x"}, "guidance_scale: 'x' given, which is not one number"),
        ({"guidance_scale": torch.ones(2)}, "guidance_scale: Tensor given, which is not one number"),
        ({"latents": "x"}, "latents: str given, which cannot be read as one tensor of numbers"),
        ({"class_labels": [[1], [2, 3]]}, "class_labels: list given, which cannot be read as one tensor"),
        ({"class_labels": torch.tensor([3, 10])}, "class_labels: class 10 given; the network has classes from 0 to 9"),
        ({"negative_class_labels": torch.tensor([-5, 3])}, "negative_class_labels: class -5 given; the network has"),
        ({"class_labels": torch.arange(2.0)}, "input 'class_labels': expected int64, found float32"),
        ({"callback": 3}, "callback: 3 cannot be called; give a function"),
    ],
)
def test_a_call_that_does_not_fit(guided: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        guided(**{**TOLD, **options})


@pytest.fixture(scope="module")
def cached(tmp_path_factory: Any) -> Any:
    options = {"guidance": 3.0, "rescale": True, "inpaint": True, "cache": "easycache:threshold=0.05"}
    return hasten.sampler(build(tmp_path_factory.mktemp("engines") / "cached", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_rescale": 2.0}, "guidance_rescale: 2 given; give a number from 0 to 1"),
        ({"guidance_rescale": -1.0}, "guidance_rescale: -1 given; give a number from 0 to 1"),
        ({"threshold": -1}, "threshold: -1 was given; it goes from 0"),
        ({"threshold": float("nan")}, "threshold: nan is not a number"),
        ({"threshold": float("inf")}, "threshold: inf was given; it goes from 0"),
        ({"limit": -5}, "limit: -5 was given; it goes from -1"),
        ({"limit": 1.5}, "limit: 1.5 is not a whole number"),
        ({"mask_image": torch.full((2, 1, 8, 8), 7.0)}, "mask_image has values outside 0 to 1; give 0 where"),
        ({"mask_image": torch.full((2, 1, 8, 8), float("nan"))}, "mask_image has values outside 0 to 1"),
        ({"mask_image": torch.ones(SHAPE)}, r"mask_image is \(2, 4, 8, 8\), and the engine takes \(2, 1, 8, 8\)"),
    ],
)
def test_a_number_that_means_nothing(cached: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cached(image=torch.zeros(SHAPE), **TOLD, **options)


def test_a_run_is_not_made_backwards(guided: Any) -> None:
    expected = guided(**TOLD).latents
    run = guided.begin(**TOLD)
    for rows in (0, -1, 2.5):
        with pytest.raises(UsageError, match=f"rows: {rows} "):
            run.advance(rows)
    assert run.done == 0
    assert torch.equal(run.advance(6).latents, expected)


@pytest.mark.parametrize("engine", [None, 3])
def test_what_is_no_engine(engine: Any) -> None:
    with pytest.raises(UsageError, match=rf"sampler: {type(engine).__name__} given; give an engine \(hasten.load\)"):
        hasten.sampler(engine)


def test_guidance_needs_what_stands_for_no_condition(guided: Any) -> None:
    with pytest.raises(UsageError, match="guidance needs 'negative_class_labels'"):
        guided(class_labels=LABELS)
    with pytest.raises(UsageError, match="'class_labels' is missing"):
        guided(negative_class_labels=NEGATIVE)


def test_an_engine_without_guidance_takes_no_scale(plain: Any) -> None:
    assert plain(class_labels=LABELS, guidance_scale=1.0).latents.shape == SHAPE
    with pytest.raises(UsageError, match="guidance_scale 3 was given to an engine without guidance"):
        plain(class_labels=LABELS, guidance_scale=3.0)
    with pytest.raises(UsageError, match="the sampler takes no 'negative_class_labels'"):
        plain(**TOLD)


def test_an_engine_of_one_step_is_no_sampler(tmp_path: Path) -> None:
    engine = hasten.build(Net().eval(), target="onnxruntime:cpu", out=tmp_path / "e", example_kwargs=examples(2))
    with pytest.raises(UsageError, match="engine 'e' holds no sampler; build it with one"):
        hasten.sampler(engine)


def test_a_sampler_is_not_run_step_by_step(guided: Any) -> None:
    with pytest.raises(UsageError, match=r"holds a whole sampler; run it with hasten.sampler\(engine\)"):
        guided.engine.start(6)


def test_a_run_that_is_over(guided: Any) -> None:
    run = guided.begin(**TOLD)
    run.advance(6)
    with pytest.raises(UsageError, match="the run has 6 rows and did them all"):
        run.advance()


def test_diffusers_callback(guided: Any) -> None:
    """Its shape, its order, the times that the network is told; and latents that it may not change."""
    seen: list[Any] = []

    def look(pipe: Any, step: int, time: float, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe, step, time, given["latents"]))
        return given

    made = guided(**TOLD, callback_on_step_end=look)
    assert [s[:3] for s in seen] == [(guided, i, t) for i, t in enumerate(guided.table().time.tolist())]
    assert torch.equal(seen[-1][3], made.latents)
    assert torch.equal(guided(**TOLD, chunk=4, callback_on_step_end=look).latents, made.latents)
    assert [s[1] for s in seen[6:]] == [3, 5]
    with pytest.raises(UsageError, match="callback_on_step_end returned other latents"):
        guided(**TOLD, callback_on_step_end=lambda *a: {"latents": a[3]["latents"] + 1})


class Unconditional(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * timestep[:, None, None, None]


class Pooled(Unconditional):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(sample, timestep).mean((2, 3))


class Renamed(nn.Module):
    def forward(self, picture: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return picture * timestep[:, None, None, None]


def _without_labels() -> dict[str, torch.Tensor]:
    return {name: t for name, t in examples(2).items() if name != "class_labels"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": None}, "must know what the network was trained on"),
        ({"form": "batch"}, "form of guidance 'batch' is none of none, batched, .* Did you mean 'batched'"),
        ({"noise": "seeds"}, "noise 'seeds' is none of none, input, seed. Did you mean 'seed'"),
        ({"guidance": -1.0}, "guidance: -1 given"),
        ({"guidance": float("nan")}, "guidance: nan given"),
        ({"guidance": float("inf")}, "guidance: inf given"),
        ({"guidance": "a"}, "guidance: 'a' given, which is not one number"),
        ({"time_scale": 0}, "time_scale: 0 given; give a number above 0"),
        ({"time_scale": float("nan")}, "time_scale: nan given"),
        ({"solver": 3}, "solver: 3 is no solver's name"),
        ({"steps": 2.5}, "steps: 2.5 is not a whole number; give 1 or more"),
        ({"steps": 0}, "steps: 0 given; give 1 or more"),
        ({"rows": 0}, "rows: 0 given; give 1 or more"),
        ({"steps": 9}, "rows: 8 given, and 9 steps make 9 evaluations"),
        ({"solver": "pndm", "rows": 40, "history": 3}, "history: 3 given, and this solver carries 6 latents"),
        ({"solver": "euler-ancestral", "noise": "none"}, "euler-ancestral adds noise in 5 rows"),
        ({"guidance": 3.0, "form": "none"}, "guidance 3 was asked for with form=none"),
        ({"guidance": 3.0, "form": "batched", "batch": 3}, "its batch of 3 is odd"),
        ({"form": "embedded"}, "embedded guidance needs a network with an input 'guidance'"),
        ({"rescale": True}, "rescale: for batched and sequential guidance, and this is none"),
        ({"sample": "smaple"}, "sample: there is no input 'smaple'.* Did you mean 'sample'"),
        ({"target": "torch-tensorrt"}, "target torch-tensorrt has no loops"),
        ({"cache": "easycache", "cache_form": "straight"}, "decides by the data of a run"),
        (
            {"net": Unconditional(), "given": _without_labels(), "form": "batched"},
            "guidance needs an input to leave out, and the network has none",
        ),
        ({"net": Pooled(), "given": _without_labels()}, "a solver needs a prediction of the sample's own sizes"),
        (
            {"net": Renamed(), "given": {"picture": torch.zeros(SHAPE), "timestep": torch.zeros(2)}},
            "which input is the sample",
        ),
    ],
)
def test_a_build_that_does_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "engine", **options)
    assert not (tmp_path / "engine").exists()


def test_dynamic_sizes_are_refused_where_a_loop_takes_none(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    message = (
        r"target tensorrt-rtx:sm89: input 'sample' has dynamic sizes \(batch, 4, 8, 8\), and a sampling loop takes a "
        "range of sizes in ONNX Runtime and AOTInductor alone; fix the sizes, or build it for onnxruntime or aoti"
    )
    with pytest.raises(UsageError, match=message):
        hasten.build(
            Net().eval(),
            target="tensorrt-rtx:sm89",
            out=tmp_path / "engine",
            example_kwargs=examples(4),
            dynamic_shapes={name: {0: batch} for name in examples(4)},
            sampling=hasten.Sampling(process=PROCESS),
        )
