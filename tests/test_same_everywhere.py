"""The bundled models give the same outputs as a module, as ONNX before and after, and as every engine that runs here.

Against the module in float64, relative to its norm, at most 2e-5. Run as a script, this file prints the errors.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import hasten
from hasten.models import registry
from hasten.models.adapter import Adapter

MODELS = ("scenes-unet", "scenes-dit", "scenes-video")
LIMIT = 2e-5
FUSED_NORMS = {"scenes-unet": 15, "scenes-dit": 0, "scenes-video": 0}
"""GroupNorm+SiLU kernels that TensorRT-RTX 1.7.1 makes; the other two of the UNet's 17 go into neighbouring kernels."""
Feed = dict[str, torch.Tensor]


def run_onnx(model: onnx.ModelProto, feed: Feed) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {i.name: feed[i.name].numpy() for i in session.get_inputs()})[0])


def ways(adapter: Adapter, folder: Path) -> Iterator[tuple[str, Callable[[Feed], torch.Tensor]]]:
    """Every way to run the model here, by name."""
    module, example = adapter.module(), adapter.example_inputs()
    yield "module", lambda feed: module(**feed)
    rewritten, _ = hasten.optimize(module, example_kwargs=example, expect=adapter.expected)
    yield "rewritten graph", lambda feed: rewritten(**feed)
    exported = torch.onnx.export(module, (), kwargs=example, dynamo=True, opset_version=20, verbose=False).model_proto
    yield "ONNX", lambda feed: run_onnx(exported, feed)
    optimised, _ = hasten.optimize_onnx(exported, expect=adapter.expected)
    yield "ONNX, optimised", lambda feed: run_onnx(optimised, feed)
    for target in ("onnxruntime:cpu", "aoti:cpu"):
        engine = hasten.build(adapter.name, target=target, out=folder / target.replace(":", "-"))
        yield f"engine, {target}", lambda feed, engine=engine: next(iter(engine(**feed).values()))


def errors(name: str, folder: Path) -> dict[str, float]:
    """The larger of the errors on two different inputs, by way."""
    adapter = registry.get(name)
    reference = copy.deepcopy(adapter.module()).double()
    found: dict[str, float] = {}
    with torch.no_grad():
        for way, run in ways(adapter, folder):
            for seed in (0, 1):
                feed = adapter.example_inputs(seed=seed)
                want = reference(**{k: v.double() if v.is_floating_point() else v for k, v in feed.items()})
                error = ((run(feed).double() - want).norm() / want.norm()).item()
                found[way] = max(found.get(way, 0.0), error)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "scenes-video" else ()) for n in MODELS]
)
def test_same_outputs(name: str, tmp_path: Path) -> None:
    found = errors(name, tmp_path)
    assert len(found) == 6
    assert {way: error for way, error in found.items() if not error <= LIMIT} == {}


@pytest.mark.parametrize("architecture", ["sm89", pytest.param("sm120", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_tensorrt_rtx_engine(name: str, architecture: str, tmp_path: Path) -> None:
    """Built for real without a GPU, in float16: the form in which TensorRT-RTX fuses attention."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    adapter = registry.get(name)
    engine = hasten.build(name, target=f"tensorrt-rtx:{architecture}", out=tmp_path / "engine", dtype="float16")
    audit = engine.manifest.audit
    assert audit["readable"]
    assert audit["counts"]["gemm_mha"] == adapter.expected["attention"]
    assert audit["counts"]["SiluGnor"] == FUSED_NORMS[name]
    assert audit["stream_capturable"]
    with pytest.raises(hasten.HastenError, match="GPU"):
        engine(**{k: np.asarray(v) for k, v in adapter.example_inputs(dtype=torch.float16).items()})


def main() -> int:
    worst = 0.0
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for way, error in errors(name, Path(folder)).items():
                worst = max(worst, error)
                print(f"{name:12} {way:24} {error:.1e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
