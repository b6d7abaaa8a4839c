"""Real-size models: ``make test-slow``. Minutes each, up to 16 GB."""

from __future__ import annotations

from pathlib import Path

import pytest

import hasten
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
