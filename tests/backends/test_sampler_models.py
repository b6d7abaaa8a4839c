"""The bundled models with the whole sampler in the engine, against the Python loop over the eager module."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from loop_net import PROCESS, Net

import hasten
from hasten.models.processes import process_of
from hasten.models.registry import get
from hasten.models.scenes.generate import generate
from hasten.passes.solvers import catalog
from hasten.tools.generate_loop import LoopDenoise

LABELS = [3, 9]
CACHES = {"scenes-unet": "easycache:threshold=0.1", "scenes-dit": "first-block:threshold=0.2"}
SOLVERS = {
    "scenes-unet": ("ddim", "pndm", "dpm++2m-karras", "unipc", "heun:spacing=leading"),
    "scenes-dit": ("flow-euler", "dpm++2m-karras", "unipc", "heun"),
}
"""On its own grid Heun's last calls see hardly any noise on scenes-unet, and are ill-conditioned: a change of 1e-6 in
what the network says is one of 1.6e-3 in the picture, in eager alone."""

pytestmark = pytest.mark.slow


def engine(folder: Any, model: str, target: str, cache: str | None) -> LoopDenoise:
    adapter = dataclasses.replace(get(model), batch=4)
    built = hasten.build(
        adapter, target=target, out=folder, cache=cache, sampling=hasten.Sampling(steps=6, guidance=2.0)
    )
    return LoopDenoise(built, adapter)


@pytest.fixture(
    scope="module",
    params=[
        (model, target, cached)
        for model in SOLVERS
        for target in ("onnxruntime:cpu", "aoti:cpu")
        for cached in (False, True)
    ],
    ids=lambda p: f"{p[0]}-{p[1]}{'-cached' if p[2] else ''}",
)
def case(request: Any, tmp_path_factory: Any) -> tuple[str, LoopDenoise]:
    model, target, cached = request.param
    folder = tmp_path_factory.mktemp("engines") / model
    return model, engine(folder, model, target, CACHES[model] if cached else None)


def test_pictures_of_every_solver(case: tuple[str, LoopDenoise]) -> None:
    model, denoise = case
    adapter = dataclasses.replace(get(model), batch=4)
    for solver in SOLVERS[model]:
        table = catalog.build(solver, process_of(model) or {}, 6)
        options = {"mask": "1" * len(table)} if denoise.sampler.loop["cache"] is not None else {}
        made = denoise.generate(LABELS, solver=table, **options)
        expected = generate(adapter.module(), adapter, LABELS, guidance=2.0, table=table)
        torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5, msg=lambda m, s=solver: f"{s}: {m}")


def test_targets_decide_alike(tmp_path: Any) -> None:
    """A step cache's decisions, and so the pictures, are the same in both runtimes."""
    made = [
        engine(tmp_path / t.partition(":")[0], "scenes-dit", t, CACHES["scenes-dit"])
        for t in ("onnxruntime:cpu", "aoti:cpu")
    ]
    runs = [m.sample(LABELS, num_inference_steps=20) for m in made]
    assert "0" in runs[0].decisions
    assert runs[0].decisions == runs[1].decisions
    torch.testing.assert_close(runs[0].latents, runs[1].latents, rtol=2e-5, atol=2e-5)


def test_a_schedule_is_known_before_the_run(tmp_path: Any) -> None:
    """What depends on the number of the row alone is still one branch, told what to do."""
    denoise = engine(tmp_path / "engine", "scenes-dit", "onnxruntime:cpu", "mask:bits=10010010,stretch=nearest")
    assert denoise.sample(LABELS, num_inference_steps=8).decisions == "10010010"
    assert denoise.sample(LABELS, num_inference_steps=8, mask="11010010").decisions == "11010010"


GROWTH = """
import sys
import torch, hasten
from hasten.tools.bench_memory import peak_bytes

sampler, few, many, keep = hasten.sampler(sys.argv[1]), *(int(word) for word in sys.argv[2:])
labels = torch.zeros(sampler.latents_shape[0], dtype=torch.int64)
for _ in range(2):  # the second run finds what the first one left free
    sampler(num_inference_steps=few, class_labels=labels)
before, run, kept = peak_bytes(), sampler.begin(num_inference_steps=many, class_labels=labels), []
while run.done < run.rows:
    run.advance(1 if keep else run.rows)
    kept += [{name: tensor.clone() for name, tensor in run._held.items()}] * keep
assert run.done == many
print(peak_bytes() - before)
"""
"""What a process of its own, which has built nothing, needs for many steps beyond what it needs for few."""


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "aoti:cpu"])
def test_memory_is_constant_in_the_number_of_steps(tmp_path: Any, target: str) -> None:
    """A state of 1.5 MiB; the same process with every row's state kept shows that it would be seen."""
    few, many, side, history = 4, 128, 128, 6
    hasten.build(
        Net().eval(),
        target=target,
        out=tmp_path / "engine",
        example_kwargs={
            "sample": torch.zeros(1, 4, side, side),
            "timestep": torch.zeros(1),
            "class_labels": torch.zeros(1, dtype=torch.int64),
        },
        sampling=hasten.Sampling(steps=few, rows=many, history=history, process=PROCESS),
    )

    def growth(keep: int) -> int:
        words = [sys.executable, "-c", GROWTH, str(tmp_path / "engine"), *map(str, (few, many, keep))]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    all_states = (many - few) * history * 4 * side * side * 4
    assert growth(keep=0) < all_states / 10
    assert growth(keep=1) > all_states * 9 / 10


@pytest.mark.parametrize(
    ("model", "cache", "form"),
    [("scenes-unet", None, "batched"), ("scenes-dit", "first-block:threshold=0.2", "sequential")],
)
def test_a_tensorrt_rtx_plan_holds_the_loop(tmp_path: Any, model: str, cache: str | None, form: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = hasten.build(
        dataclasses.replace(get(model), batch=4),
        target="tensorrt-rtx:sm89",
        out=tmp_path / "engine",
        cache=cache,
        sampling=hasten.Sampling(guidance=2.0, noise="seed", form=form, rescale=True, inpaint=True),
    )
    audit = built.manifest.audit
    assert audit is not None
    assert audit["layers"]["TRIP_LIMIT"] > 0
    assert ("CONDITION" in audit["layers"]) == (cache is not None)
    if not audit["readable"]:
        pytest.skip(audit["reason"])
    assert audit["counts"]["cjmp"] > (2 if cache is not None else 0)
    assert audit["stream_capturable"] is False


def test_a_tensorrt_rtx_plan_of_a_real_unet_holds_the_loop(tmp_path: Any) -> None:
    """SD1.5's UNet in bfloat16: loop, solver, guidance and cache in one plan, built without a GPU and never run."""
    pytest.importorskip("tensorrt_rtx")
    adapter = get("sd15-unet")
    built = hasten.build(
        adapter,
        target="tensorrt-rtx:sm89",
        out=tmp_path / "engine",
        dtype="bfloat16",
        cache="easycache:threshold=0.1",
        sampling=hasten.Sampling(solver="dpm++2m", steps=20, guidance=7.5),
    )
    audit = built.manifest.audit
    assert audit is not None
    assert audit["layers"]["TRIP_LIMIT"] > 0
    assert audit["layers"]["CONDITION"] > 0
    assert audit["peak_bytes"] < 7e9
    plan = (built.path / built.manifest.artifact).stat().st_size
    assert plan < 1.1 * 2 * adapter.parameters  # each weight once
    if not audit["readable"]:
        pytest.skip(audit["reason"])
    assert audit["bytes"]["rest"] < 1.05 * audit["weight_bytes"]
    assert (audit["counts"]["gemm_mha"], audit["counts"]["SiluGnor"]) == (32, 45)
    assert audit["counts"]["cjmp"] > 2
