"""The Triton kernels, run on the CPU by Triton's interpreter.

The interpreter is chosen when Triton is imported, so the checks run in one process of their own; each prints what it
found and the tests read it.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_CHECKS = """
import json, torch
from hasten.passes.ops import geglu, group_norm_act
from hasten.passes.ops.geglu.triton import launch as launch_geglu
from hasten.passes.ops.group_norm_act.triton import launch as launch_norm

torch.manual_seed(0)
found = {}

def norm(name, x, act="silu", groups=4, affine=True, modulate=False):
    channels = x.shape[1]
    weight, bias = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    scale, shift = (torch.randn(x.shape[0], channels), torch.randn(1, channels)) if modulate else (None, None)
    y = launch_norm(x, weight, bias, scale, shift, groups, 1e-5, act)
    expected = group_norm_act.reference(x, weight, bias, scale, shift, groups, 1e-5, act)
    error = ((y - expected).abs() / (1 + expected.abs())).max().item() if x.numel() else 0.0
    found[name] = [error, str(y.dtype), list(y.stride()) == list(x.stride())]

image = torch.randn(2, 12, 7, 5)
for act in ("none", "silu", "gelu", "gelu_tanh", "quick_gelu"):
    norm(act, image, act)
norm("modulated", image, modulate=True)
norm("plain", image, affine=False)
norm("channels-last", image.contiguous(memory_format=torch.channels_last), modulate=True)
norm("tokens", torch.randn(2, 8, 11))
norm("video", torch.randn(1, 8, 3, 4, 5))
norm("vectors", torch.randn(3, 8))
norm("two chunks", torch.randn(1, 8, 70, 70))
norm("two chunks channels-last", torch.randn(1, 8, 70, 70).contiguous(memory_format=torch.channels_last))
norm("mean 10000", torch.randn(2, 8, 33, 33) + 1e4)
norm("constant", torch.full((1, 8, 4, 4), 3.0))
norm("one element", torch.randn(2, 4, 1, 1))
norm("empty", torch.randn(0, 8, 4, 4))
norm("half", (torch.randn(2, 8, 33, 33) * 8 + 30000).half())
norm("bfloat16", torch.randn(2, 8, 9, 9).bfloat16())

for approximate in ("none", "tanh"):
    for gate_first in (False, True):
        for shape in ((3, 5, 14), (2, 2058), (0, 4)):
            x = torch.randn(shape)
            y = launch_geglu(x, approximate, gate_first)
            expected = geglu.reference(x, approximate, gate_first)
            name = f"geglu {approximate} {gate_first} {shape}"
            error = (y - expected).abs().max().item() if y.numel() else 0.0
            found[name] = [error, str(y.dtype), y.shape == expected.shape]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", _CHECKS], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_float32_results_agree_with_the_reference(found):
    errors = {name: error for name, (error, dtype, _) in found.items() if dtype == "torch.float32"}
    assert len(errors) == 29
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def test_half_precision_is_rounded_once(found):
    assert found["half"][0] <= 1e-3
    assert found["bfloat16"][0] <= 8e-3
    assert (found["half"][1], found["bfloat16"][1]) == ("torch.float16", "torch.bfloat16")


def test_layout_and_shape_are_kept(found):
    assert [name for name, (_, _, kept) in found.items() if not kept] == []
