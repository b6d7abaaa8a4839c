"""Real-size models: ``make test-slow``. Minutes each, up to 16 GB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hasten
from hasten.backends.choosing import Choosing
from hasten.models import registry

pytestmark = pytest.mark.slow


def test_sd15_unet_on_tensorrt_rtx(tmp_path: Path) -> None:
    """All 61 norms and 32 attentions of SD1.5 end in fused kernels of an engine built without a GPU.

    In bfloat16: the capture is compared with the module in the engine's type, and float16 is slow on processors.
    """
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    expected = registry.get("sd15-unet").expected
    engine = hasten.build(
        "sd15-unet", target="tensorrt-rtx:sm89", out=tmp_path / "unet", dtype="bfloat16", expect=expected
    )
    counts = engine.manifest.audit["counts"]
    assert counts["gemm_mha"] == 32
    assert counts["SiluGnor"] == 45
    assert counts["Gnor"] == 16
    assert engine.manifest.audit["stream_capturable"]


def test_sd15_vae_decoder_is_as_exact_as_eager() -> None:
    """31 of its 33 3x3 convolutions are Winograd's, and the error against float64 is at most 1e-5."""
    adapter = registry.get("sd15-vae-decoder")
    inputs = {"latent": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        _, report = hasten.optimize(
            adapter.module(), example_kwargs=inputs, target="aoti:cpu", choosing=Choosing(tune="off", max_error=1e-5)
        )
    assert report["winograd-conv2d"].hits == 31
    assert report.error is not None
    assert report.error <= 1e-5


def test_dit_xl_2_jumps_over_its_blocks_on_tensorrt_rtx(tmp_path: Path) -> None:
    """DiT-XL/2 with a cache that looks at data: one conditional jump, and all 28 blocks behind it."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    engine = hasten.build(
        "dit-xl-2",
        target="tensorrt-rtx:sm89",
        out=tmp_path / "dit",
        dtype="bfloat16",
        cache="teacache:threshold=0.2,coefficients=1/0",
    )
    assert engine.manifest.cache is not None
    assert engine.manifest.cache["share"] > 0.99
    audit = engine.manifest.cache["programs"]["step"]["audit"]
    assert audit["stream_capturable"] is False
    counts, behind = audit["counts"], audit["behind_jumps"]
    assert counts["cjmp"] == 1
    assert counts["gemm_mha"] == behind["gemm_mha"] == 28
    # Outside are the patches' convolution, the first block's modulation, which is looked at, and the last projection.
    assert behind["runtime_fusion"] >= 4 * 28
    assert counts["runtime_fusion"] - behind["runtime_fusion"] <= 8
