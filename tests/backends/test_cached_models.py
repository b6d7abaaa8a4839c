"""Step caches on the bundled transformers: every back end makes the same decisions and the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import hasten
from hasten.backends.program import flatten
from hasten.backends.region import find_cut
from hasten.backends.step_cache import example
from hasten.errors import HastenError, UsageError
from hasten.models import registry
from hasten.models.adapter import Adapter
from hasten.models.scenes.generate import generate
from hasten.passes.fx.step_cache import conditional
from hasten.passes.steps.catalog import parse

STEPS = 20
POLICIES = ("teacache:threshold=0.2,coefficients=1/0", "first-block:threshold=0.2", "adacache:codebook=30-fast")


@pytest.fixture(scope="module")
def adapter(request: Any) -> Adapter:
    return replace(registry.get(getattr(request, "param", "scenes-dit")), batch=4)


def pictures(adapter: Adapter, denoise: Callable[..., torch.Tensor], steps: int = STEPS) -> torch.Tensor:
    return generate(denoise, adapter, [0, 5], steps=steps)


def eager(adapter: Adapter, text: str) -> tuple[torch.Tensor, str]:
    """The cached graph, run node by node."""
    policy = parse(text)
    program = torch.export.export(adapter.module(), (), kwargs=adapter.example_inputs(), strict=False)
    flat = flatten(program.module(check_guards=False), program)
    cached = conditional(flat.module, find_cut(flat.module, policy).cut, policy)
    step = cached.programs["step"]
    state = {t.name: example(t.value, t.start) for t in cached.state}
    forced, mask = policy.decision.forced(STEPS), []

    def denoise(*inputs: torch.Tensor) -> torch.Tensor:
        controls = {
            "cache_step": torch.tensor(len(mask)),
            "cache_steps": torch.tensor(STEPS),
            "cache_force": torch.tensor(int(forced[len(mask)])),
            "cache_threshold": torch.tensor(policy.decision.threshold, dtype=torch.float32),
            "cache_limit": torch.tensor(policy.decision.limit),
        }
        known = {**state, **controls}
        result, *written = step.module(*inputs, *(known[n] for n in step.extra_inputs))
        state.update(dict(zip(step.extra_outputs, written, strict=True)))
        mask.append(int(state.pop("cache_computed")))
        return result

    return pictures(adapter, denoise), "".join(map(str, mask))


def call(run: hasten.CachedRun, *tensors: torch.Tensor) -> torch.Tensor:
    names = [t.name for t in run.engine.inputs if not t.name.startswith("cache_")]
    (result,) = run(**dict(zip(names, tensors, strict=True))).values()
    return result


@pytest.mark.parametrize("text", [POLICIES[0], *(pytest.param(p, marks=pytest.mark.slow) for p in POLICIES[1:])])
@pytest.mark.parametrize("adapter", ["scenes-dit", pytest.param("scenes-video", marks=pytest.mark.slow)], indirect=True)
def test_every_back_end_decides_and_draws_the_same(adapter: Adapter, text: str, tmp_path: Any) -> None:
    wanted, mask = eager(adapter, text)
    assert 3 < mask.count("1") < STEPS - 3
    for target, form in (("onnxruntime:cpu", None), ("aoti:cpu", None), ("onnxruntime:cpu", "straight")):
        engine = hasten.build(adapter, target=target, out=tmp_path / f"{target}-{form}", cache=text, cache_form=form)
        run = engine.start(STEPS)
        found = pictures(adapter, partial(call, run))
        assert run.mask == mask
        assert float((found - wanted).norm() / wanted.norm()) < 2e-5


def test_one_graph_and_no_recompilation(adapter: Adapter) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapter.module()
    compiled = torch.compile(model, backend="hasten", fullgraph=True, options={"cache": POLICIES[0]})
    settings = hasten.step_cache(model)
    masks = []
    for threshold, steps in ((0.2, 50), (0.05, 50), (0.4, 20)):
        settings.threshold, settings.steps = threshold, steps
        pictures(adapter, compiled, steps)
        assert len(settings.masks) == 1
        assert len(settings.masks[0]) == steps
        masks.append(settings.masks[0].count("1") / steps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert masks[1] > masks[0] > 0


def test_torch_compile_decides_as_the_engine(adapter: Adapter) -> None:
    wanted, mask = eager(adapter, POLICIES[1])
    model = adapter.module()
    compiled = torch.compile(model, backend="hasten", fullgraph=True, options={"cache": POLICIES[1]})
    hasten.step_cache(model).steps = STEPS
    found = pictures(adapter, compiled)
    assert hasten.step_cache(model).masks == [mask]
    assert float((found - wanted).norm() / wanted.norm()) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes-dit", "scenes-video"])
def test_a_tensorrt_rtx_plan_jumps_over_all_blocks(name: str, tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    engine = hasten.build(name, target="tensorrt-rtx:sm89", out=tmp_path / "plan", dtype="float16", cache=POLICIES[0])
    audit = engine.manifest.cache["programs"]["step"]["audit"]  # type: ignore[index]
    counts, behind = audit["counts"], audit["behind_jumps"]
    assert counts["cjmp"] == 1
    assert audit["stream_capturable"] is False
    assert counts["gemm_mha"] == behind["gemm_mha"] == registry.get(name).expected["attention"]
    assert counts["runtime_fusion"] - behind["runtime_fusion"] <= 8


def test_blocks_that_are_asked_for(adapter: Adapter, tmp_path: Any) -> None:
    engine = hasten.build(
        adapter, target="onnxruntime:cpu", out=tmp_path / "some", cache="mask:1010", region="2:5", cache_form="straight"
    )
    assert engine.manifest.cache is not None
    assert engine.manifest.cache["region"].startswith("blocks 2 to 4 of 6")
    with pytest.raises(UsageError, match="region '4:9' holds no block, or one that is not there"):
        hasten.build(adapter, target="onnxruntime:cpu", out=tmp_path / "none", cache="mask:1010", region="4:9")


def test_a_graph_without_blocks_is_refused(tmp_path: Any) -> None:
    decoder = registry.get("sd15-vae-decoder", reduced=True)
    with pytest.raises(HastenError, match="teacache finds nothing to skip in this graph: "):
        hasten.build(decoder, target="onnxruntime:cpu", out=tmp_path / "none", cache=POLICIES[0])
