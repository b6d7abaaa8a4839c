"""scenes-video with the whole sampler, guidance and a step cache in one engine; whatever its weights are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hasten
from hasten.models.adapter import Adapter
from hasten.models.processes import process_of
from hasten.models.registry import get
from hasten.models.scenes.generate import generate
from hasten.passes.solvers import catalog
from hasten.tools.generate_loop import LoopDenoise

LABELS, STEPS = [7], 4
CACHE = "first-block:threshold=0.2"


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """One network for all tests, also while another is being trained; one clip, guided as a batch of two."""
    module = get("scenes-video").module()
    return dataclasses.replace(get("scenes-video"), batch=2, build=lambda _: module)


@pytest.fixture(
    scope="module", params=["onnxruntime:cpu", pytest.param("aoti:cpu", marks=pytest.mark.slow)], ids=lambda t: t[:4]
)
def sampler(request: Any, adapter: Adapter, tmp_path_factory: Any) -> LoopDenoise:
    engine = hasten.build(
        adapter,
        target=request.param,
        out=tmp_path_factory.mktemp("engines") / "video",
        cache=CACHE,
        sampling=hasten.Sampling(solver="dpm++2m", steps=STEPS, guidance=2.0),
    )
    return LoopDenoise(engine, adapter)


@pytest.mark.parametrize("solver", ["dpm++2m", "flow-euler", "dpm++2m-karras", "unipc", "heun"])
def test_clips_are_those_of_a_python_loop(sampler: LoopDenoise, adapter: Adapter, solver: str) -> None:
    table = catalog.build(solver, process_of("scenes-video") or {}, STEPS)
    made = sampler.generate(LABELS, solver=table, mask="1" * len(table))
    expected = generate(adapter.module(), adapter, LABELS, guidance=2.0, table=table)
    assert made.shape == (1, 8, 3, 32, 32)
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)


def test_a_reused_step_is_another_clip(sampler: LoopDenoise) -> None:
    every = sampler.sample(LABELS, mask="1" * STEPS)
    some = sampler.sample(LABELS, mask="1011")
    assert (every.decisions, some.decisions) == ("1111", "1011")
    assert not torch.allclose(some.latents, every.latents, atol=1e-4)
    free = sampler.sample(LABELS, threshold=1e9).decisions
    assert free[0] == "1"
    assert "0" in free


def test_a_tensorrt_rtx_plan_holds_it_all(adapter: Adapter, tmp_path: Any) -> None:
    """Loop, solver, guidance and cache, built without a GPU and never run."""
    pytest.importorskip("tensorrt_rtx")
    engine = hasten.build(
        adapter,
        target="tensorrt-rtx:sm89",
        out=tmp_path / "engine",
        cache=CACHE,
        sampling=hasten.Sampling(solver="dpm++2m", steps=STEPS, guidance=2.0),
    )
    audit = engine.manifest.audit
    assert audit is not None
    assert audit["layers"]["TRIP_LIMIT"] > 0
    assert audit["layers"]["CONDITION"] > 0
    if not audit["readable"]:
        pytest.skip(audit["reason"])
    assert audit["counts"]["cjmp"] > 1
    assert audit["stream_capturable"] is False
    # both branches, the loop and the guidance's two halves share one copy; most of the plan is the source of kernels
    weights = sum(p.nbytes for p in adapter.module().parameters())
    assert weights < audit["weight_bytes"] < 1.05 * weights
    assert audit["bytes"]["rest"] < 1.05 * audit["weight_bytes"]
    assert audit["bytes"]["plan"] == (engine.path / engine.manifest.artifact).stat().st_size
