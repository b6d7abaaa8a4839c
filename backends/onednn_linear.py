"""Linear layers of frozen float32 graphs in oneDNN's layout, where Inductor takes MKL's unless it compiles packages.

Two threads of a Zen 4 (AVX-512), GFLOP/s (20th to 80th percentile): 8192x320x2560 212 (201 to 219) with oneDNN's packed
weights and 168 (160 to 171) with MKL's; 8192x1280x320 216 and 173; 512x1152x3456 205 and 169. oneDNN also takes up the
activation or the addition behind the layer. MKL's choice is a rule of `torch._inductor.fx_passes.mkldnn_fusion`, which
no option changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def onednn_linear() -> Iterator[None]:
    """Lay weights of linear layers out for oneDNN in what Inductor compiles meanwhile on a CPU."""
    from torch._inductor.fx_passes import mkldnn_fusion

    packing: Any = getattr(mkldnn_fusion, "CpuMkldnnDeviceOp", None)
    if packing is None or not torch._C._has_mkldnn or not hasattr(packing, "pack_linear"):
        yield
        return
    pack_weight, pack = packing.pack_linear_weight, packing.pack_linear

    # Both take the path of two-byte weights, which is oneDNN's and looks at nothing else.
    def weight_for_onednn(self: Any, graph: Any, is_lp_weight: bool, weight: Any, batch_size: Any) -> Any:
        return pack_weight(self, graph, True, weight, batch_size)

    def call_of_onednn(
        self: Any, graph: Any, is_lp_weight: bool, batch_size: Any, x: Any, weight: Any, bias: Any
    ) -> Any:
        return pack(self, graph, True, batch_size, x, weight, bias)

    with (
        patch.object(packing, "pack_linear_weight", weight_for_onednn),
        patch.object(packing, "pack_linear", call_of_onednn),
    ):
        yield
