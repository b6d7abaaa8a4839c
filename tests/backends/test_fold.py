"""A decision that depends on the timestep alone is a mask before the run: no branch, none of its state."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from test_cached_onnx import STEPS, examples, somebodys, transformer

import hasten
from hasten.backends.fold import fold, times_of
from hasten.backends.region import Found
from hasten.backends.step_cache import Caching
from hasten.errors import HastenError, UsageError
from hasten.models.adapter import Adapter
from hasten.models.registry import get
from hasten.passes.steps.catalog import parse

TIMES = tuple(999.0 - 80 * i for i in range(12))
POLICY = "teacache:threshold=1.5,coefficients=1/0,signal=time-embedding"
TOLD = f"{POLICY},times={'/'.join(f'{t:g}' for t in TIMES)}"


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return get("dit-xl-2", reduced=True)


def drive(engine: hasten.Engine, adapter: Adapter) -> tuple[str, list[torch.Tensor]]:
    run, given = engine.start(len(TIMES)), adapter.example_inputs()
    outputs = []
    for i, time in enumerate(TIMES):
        moved = {**given, "timestep": torch.full_like(given["timestep"], time)}
        moved["hidden_states"] = given["hidden_states"] * (1 - 0.03 * i)
        outputs.append(next(iter(run(**moved).values())))
    return run.mask, outputs


def test_a_folded_engine_decides_as_the_one_that_decides_in_the_run(adapter: Adapter, tmp_path: Any) -> None:
    free = hasten.build(adapter, target="onnxruntime:cpu", out=tmp_path / "free", cache=POLICY)
    told = hasten.build(adapter, target="onnxruntime:cpu", out=tmp_path / "told", cache=TOLD)
    (mask, wanted), (folded, found) = drive(free, adapter), drive(told, adapter)
    assert folded == mask
    assert 3 < mask.count("1") < len(TIMES) - 2
    for result, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert free.manifest.cache["form"] == "conditional"
    cache = told.manifest.cache
    assert (cache["form"], set(cache["programs"])) == ("straight", {"compute", "reuse"})
    assert cache["policy"].startswith(f"mask:bits={mask},")
    assert "the mask is what teacache decides at the timesteps that it was told" in cache["summary"]
    assert {s["name"] for s in told.manifest.state} == {"cache_residual"}
    for program in cache["programs"]:
        model = onnx.load(told.path / f"{program}.onnx", load_external_data=False)
        assert not any(node.op_type == "If" for node in model.graph.node)
    with pytest.raises(UsageError, match="mask: it was made for 12 steps and the run has 20"):
        told.start(20)


def test_a_branch_is_kept_where_it_is_asked_for() -> None:
    assert Caching.of(TOLD, "conditional").form == "conditional"
    assert Caching.of(TOLD).form == "straight"
    assert Caching.of(POLICY).form == "conditional"
    assert times_of(parse(TOLD)) == TIMES


def test_an_onnx_file_is_folded_as_the_module_is(tmp_path: Any) -> None:
    times = "/".join(f"{1 - step / STEPS:.7g}" for step in range(STEPS))
    text = f"teacache:threshold=0.1,coefficients=1/0,signal=time-embedding,times={times}"
    of_onnx = hasten.build(somebodys(), target="onnxruntime:cpu", out=tmp_path / "onnx", cache=text)
    of_module = hasten.build(
        transformer(), target="onnxruntime:cpu", out=tmp_path / "module", cache=text, example_inputs=examples()
    )
    assert of_onnx.manifest.cache["policy"] == of_module.manifest.cache["policy"]
    assert of_onnx.manifest.cache["form"] == "straight"
    assert "0" in of_onnx.manifest.cache["policy"].partition(",")[0]


def test_a_signal_of_more_than_the_time_is_not_folded() -> None:
    with pytest.raises(HastenError, match="the signal does not depend on the timestep alone in this graph; leave"):
        fold(parse(TOLD), Found(None, (), 1.0, None), lambda _: 0)
