"""Every spelling as the exporters write it in ONNX: one attention node, the same numbers."""

from __future__ import annotations

import pytest
import torch
from graphs import Module, assert_equal, in_float64, rewritten
from spellings import CASES, inputs

NOT_EXPORTED = {
    "onnx-20": {"fused-three-axes"},
    "onnx-23": {"fused-three-axes"},
    "torchscript": {"fused-grouped"},
    "torchscript-dynamic": {"fused-grouped"},
}
"""What torch's exporters have no ONNX form for."""

LEFT_ALONE = {"torchscript-dynamic": {"mbart", "grouped-repeat-interleave"}}
"""Sizes that the old exporter computes in the graph: ONNX's shape inference does not find that they are the batch."""


@pytest.mark.parametrize("level", ["onnx-20", "onnx-23", "torchscript", "torchscript-dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_is_recognised_and_equal(name: str, level: str) -> None:
    if name in NOT_EXPORTED.get(level, ()):
        with pytest.raises((torch.onnx.OnnxExporterError, AssertionError)):
            rewritten(level, Module(CASES[name].function), inputs(CASES[name]), "attention")
        return
    case = CASES[name]
    module, args = Module(case.function), inputs(case)
    got = rewritten(level, module, args, "attention")
    report = got.report["attention"]
    assert report.reverted == ()
    assert report.hits == (name not in LEFT_ALONE.get(level, ())), report.misses
    for seed in (0, 1):
        args = inputs(case, seed=seed)
        assert_equal(got.run(*args), in_float64(module, args))
    assert got.again["attention"].hits == 0
