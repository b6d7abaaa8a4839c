"""The pass that gives attention the C++ kernel: what it takes up, what it leaves and why, what engines carry."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hasten
from hasten.backends import dynamo
from hasten.backends.choosing import Choosing
from hasten.passes import pipeline
from hasten.passes.fx import native_attention
from hasten.passes.fx.graph import FxGraph
from hasten.passes.ops.attention.flash import WIDEST
from hasten.passes.ops.native import build
from hasten.passes.rule import Report


@pytest.fixture(autouse=True)
def _native():
    assert build.load() is None, "the C++ kernels are not to be had on this machine"
    torch._dynamo.reset()
    dynamo.reports.clear()
    torch.manual_seed(0)


class Heads(nn.Module):
    """Self-attention between two projections, as transformer blocks have it."""

    def __init__(self, width=64, heads=4, **options):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.options = heads, options

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


def optimized(module, x, **more):
    with torch.no_grad():
        made, report = hasten.optimize(module.eval(), (x,), target="inductor:cpu", **more)
        assert torch.allclose(made(x), module(x), atol=1e-5)
    assert not report.reverted
    return made, report


def test_attention_of_exported_graphs():
    made, report = optimized(Heads(), torch.randn(2, 64, 64))
    assert report["attention"].hits == report["native-attention"].hits == 1
    assert report.ops_after["hasten.flash_attention"] == 1
    assert "hasten.attention" not in report.ops_after
    (node,) = [n for n in made.graph.nodes if n.target is torch.ops.hasten.flash_attention.default]
    assert node.meta["hasten_rule"] == "native-attention"
    again = pipeline.run(
        FxGraph(made), pipeline.parse("native-attention"), pipeline.Context(target="inductor:cpu"), Report()
    )
    assert again["native-attention"].hits == 0


def test_the_definition_spelled_out():
    class Spelled(nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.transpose(-1, -2) * 0.3, -1) @ x

    _, report = optimized(Spelled(), torch.randn(2, 3, 32, 24))
    assert report["native-attention"].hits == 1


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (Heads(is_causal=True), torch.randn(1, 32, 64), "the kernel has no masks"),
        (Heads(attn_mask=torch.randn(32, 32)), torch.randn(1, 32, 64), "the kernel has no masks"),
        (
            Heads().to(torch.bfloat16),
            torch.randn(1, 32, 64).bfloat16(),
            "q is bfloat16 on cpu; the kernel is for float32 on a CPU",
        ),
        (
            Heads(WIDEST + 8, 1),
            torch.randn(1, 32, WIDEST + 8),
            f"heads are {WIDEST + 8} wide; the kernel was measured up to {WIDEST}",
        ),
        (Heads(), torch.randn(2, 17, 64), "17 queries fill 53% of the kernel's vectors; torch's is faster"),
        (Heads(), torch.randn(2, 1, 64), "1 queries fill 6% of the kernel's vectors; torch's is faster"),
    ],
    ids=["causal", "masked", "bfloat16", "wide", "17 queries", "one query"],
)
def test_left_alone(module, x, reason):
    with torch.no_grad():
        _, report = hasten.optimize(module.eval(), (x,), target="inductor:cpu")
    assert [m.reason for m in report["native-attention"].misses] == [reason]
    assert report.ops_after["hasten.attention"] == 1


def test_strict_nan():
    with torch.no_grad():
        _, report = hasten.optimize(
            Heads().eval(), (torch.randn(1, 32, 64),), target="inductor:cpu", choosing=Choosing(strict_nan=True)
        )
    (miss,) = report["native-attention"].misses
    assert miss.reason == "an infinite value meets weights that underflow, and strict-nan was asked for"


def test_other_processors_and_no_kernels(monkeypatch):
    x = torch.randn(1, 32, 64)
    monkeypatch.setattr(build, "load", lambda: "HASTEN_NATIVE=0 turns the C++ kernels off")
    _, report = optimized(Heads(), x)
    assert [m.reason for m in report["native-attention"].misses] == ["HASTEN_NATIVE=0 turns the C++ kernels off"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    _, report = optimized(Heads(), x)
    (miss,) = report["native-attention"].misses
    assert miss.reason == "the kernel was measured with AVX2 and AVX512 only, and this processor has DEFAULT"


def test_other_targets_keep_the_operator_that_they_export():
    with torch.no_grad():
        for target in ("onnxruntime:cpu", "tensorrt-rtx:sm89", "inductor:cuda"):
            _, report = hasten.optimize(Heads().eval(), (torch.randn(1, 32, 64),), target=target)
            assert report.ops_after["hasten.attention"] == 1


def test_torch_compile_with_dynamic_sizes():
    module = Heads().eval()
    compiled = torch.compile(module, backend="hasten", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, tokens in ((2, 64), (3, 80), (2, 33)):
            x = torch.randn(batch, tokens, 64)
            assert torch.allclose(compiled(x), module(x), atol=1e-5)
    assert {r["native-attention"].hits for r in dynamo.reports} == {1}


@pytest.mark.parametrize(("queries", "share"), [(0, 0.0), (1, 1 / 16), (16, 1.0), (17, 17 / 32), (256, 1.0)])
def test_filled(queries, share):
    assert native_attention.filled(queries) == share


RUN = """
import sys, numpy as np, hasten
io = np.load(sys.argv[2])
engine = hasten.load(sys.argv[1])
(y,) = engine(**{engine.inputs[0].name: io["x"]}).values()
print(float(np.abs(np.asarray(y) - io["y"]).max()) < 1e-5)
"""


def test_an_engine_brings_the_kernel_along(tmp_path):
    module, x = Heads().eval(), torch.randn(2, 64, 64)
    engine = hasten.build(module, target="aoti:cpu", out=tmp_path / "engine", example_inputs=(x,))
    assert (engine.path / build.LIBRARY).is_file()
    with torch.no_grad():
        np.savez(tmp_path / "io.npz", x=x.numpy(), y=module(x).numpy())
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(engine.path), str(tmp_path / "io.npz")],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "/nowhere/g++", "HASTEN_CACHE_DIR": str(tmp_path / "none")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
