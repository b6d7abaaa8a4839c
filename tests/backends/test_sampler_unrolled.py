"""Samplers without a loop or a branch: every decision of the step cache is known when the engine is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from loop_net import LABELS, NEGATIVE, PROCESS, Net, examples, unit_noise

import hasten
from hasten.backends.sampler import Sampler
from hasten.errors import UsageError

TOLD = {"class_labels": LABELS, "negative_class_labels": NEGATIVE}
BITS = "110100"
POLICIES = {
    "value": f"mask:bits={BITS},granularity=output",
    "taylor": f"mask:bits={BITS},granularity=output,payload=taylor",
}


def built(folder: Path, target: str, policy: str, form: str, guided: str = "batched", **options: Any) -> Sampler:
    engine = hasten.build(
        Net().eval(),
        target=target,
        out=folder / f"{guided}-{form}",
        example_kwargs=examples(4 if guided == "batched" else 2),
        cache=policy,
        cache_form=form,
        sampling=hasten.Sampling(
            "dpm++2m", **{"steps": 6, "guidance": 3.0, "process": PROCESS, "form": guided} | options
        ),
    )
    return hasten.sampler(engine)


@pytest.mark.parametrize(
    ("target", "policy", "guided"),
    [
        ("onnxruntime:cpu", "value", "batched"),
        ("onnxruntime:cpu", "taylor", "sequential"),
        pytest.param("aoti:cpu", "taylor", "batched", marks=pytest.mark.slow),
    ],
)
def test_the_rows_one_behind_another_are_those_of_the_loop(
    target: str, policy: str, guided: str, tmp_path: Path
) -> None:
    looped = built(tmp_path, "onnxruntime:cpu", POLICIES[policy], "conditional", guided)
    straight = built(tmp_path, target, POLICIES[policy], "straight", guided)
    noise = unit_noise(1)[0]
    expected, found = (s(latents=noise, **TOLD) for s in (looped, straight))
    assert found.decisions == expected.decisions == BITS
    for name in ("latents", "preview"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5)
    other = straight(latents=noise, solver="ddim", guidance_scale=1.5, **TOLD)  # the table is still an input
    expected = looped(latents=noise, solver="ddim", guidance_scale=1.5, **TOLD)
    torch.testing.assert_close(other.latents, expected.latents, rtol=2e-5, atol=2e-5)
    given = {t.name for t in straight.engine.inputs}
    assert given.isdisjoint({"first", "stop", "cache_forced", "cache_limit", "cache_threshold"})
    assert straight.loop["unrolled"] == BITS
    assert straight.loop["cache"]["form"] == "straight"


def test_nothing_is_left_of_the_loop_the_branch_or_the_state(tmp_path: Path) -> None:
    sampler = built(tmp_path, "onnxruntime:cpu", POLICIES["value"], "straight")
    graph = onnx.load(sampler.engine.path / "model.onnx").graph
    assert {n.op_type for n in graph.node}.isdisjoint({"Loop", "Scan", "If"})
    assert sampler.engine.manifest.state == ()
    assert [v.name for v in graph.output] == ["latents", "preview", "next_state", "next_cache_mask"]
    looped = built(tmp_path, "onnxruntime:cpu", POLICIES["value"], "conditional")
    body = (
        next(n for n in onnx.load(looped.engine.path / "model.onnx").graph.node if n.op_type == "Loop").attribute[0].g
    )
    convolutions = sum(n.op_type == "Conv" for branch in _branches(body) for n in branch.node)
    assert convolutions
    assert sum(n.op_type == "Conv" for n in graph.node) == BITS.count("1") * convolutions
    weights = [t for t in graph.initializer if len(t.dims) == 4]
    assert len({t.SerializeToString() for t in weights}) == len(weights)  # each is there once


def _branches(body: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [body, *(a.g for n in body.node if n.op_type == "If" for a in n.attribute)]


def test_a_tensorrt_rtx_plan_can_be_captured(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    audit = built(tmp_path, "tensorrt-rtx:sm89", POLICIES["value"], "straight").engine.manifest.audit
    assert audit is not None
    assert audit["stream_capturable"]
    assert audit["counts"]["cjmp"] == 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: Any) -> Sampler:
    return built(tmp_path_factory.mktemp("engines"), "onnxruntime:cpu", POLICIES["value"], "straight")


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 5},
        {"mask": "111111"},
        {"threshold": 0.1},
        {"limit": 2},
        {"chunk": 2},
        {"callback_on_step_end": lambda *_: {}},
        {"image": torch.zeros(unit_noise(1)[0].shape), "strength": 0.5, "solver": "ddim"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_was_settled_when_it_was_built_is_not_asked_again(straight: Sampler, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--cache-form conditional"):
        straight(**TOLD, **options)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("easycache:threshold=0.1", {}, "decides by the data of a run"),
        (POLICIES["value"], {"rows": 40}, "a row for each of its 6 evaluations"),
        (POLICIES["value"], {"steps": 7}, "6"),
    ],
)
def test_a_build_that_cannot_be(policy: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        built(tmp_path, "onnxruntime:cpu", policy, "straight", **options)
    assert not list(tmp_path.glob("*/manifest.json"))
