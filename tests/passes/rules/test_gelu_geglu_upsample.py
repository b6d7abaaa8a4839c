"""GELU chains, GEGLU gates and upsampled convolutions on every kind of graph; and what is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import LEVELS, Module, assert_equal, in_float64, rewritten
from torch.nn import functional as F

R = math.sqrt(0.5)
T = math.sqrt(2 / math.pi)

GELU = {
    "half-times-x-first": ("erf", lambda x: x * 0.5 * (1 + torch.erf(x * R))),
    "half-last": ("erf", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5),
    "half-outside": ("erf", lambda x: 0.5 * (x * (torch.erf(x / math.sqrt(2)) + 1.0))),
    "divided-by-two": ("erf", lambda x: x / 2 * (1 + torch.erf(x * R))),
    "tanh-power": ("tanh", lambda x: 0.5 * x * (1 + torch.tanh(T * (x + 0.044715 * torch.pow(x, 3))))),
    "tanh-product": ("tanh", lambda x: 0.5 * x * (1 + torch.tanh(T * (x + 0.044715 * x * x * x)))),
    "tanh-factored": ("tanh", lambda x: x * 0.5 * (1 + torch.tanh(x * T * (1 + 0.044715 * x * x)))),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", GELU)
def test_gelu(name: str, level: str) -> None:
    variant, function = GELU[name]
    module, x = Module(function), noise(3, 7)
    got = rewritten(level, module, (x,))
    assert [s.variant for s in got.report["gelu"].sites] == [variant], got.report["gelu"].misses
    assert_equal(got.run(x), in_float64(module, (x,)))
    assert got.again["gelu"].hits == 0


NOT_GELU = {
    "another constant": lambda x: x * 0.5 * (1 + torch.erf(x * 0.7)),
    "another variable inside": lambda x: x * 0.5 * (1 + torch.erf((x + 1) * R)),
    "no half": lambda x: x * (1 + torch.erf(x * R)),
    "minus": lambda x: x * 0.5 * (1 - torch.erf(x * R)),
    "another cubic": lambda x: 0.5 * x * (1 + torch.tanh(T * (x + 0.05 * x**3))),
}


@pytest.mark.parametrize("level", ["export", "onnx-18"])
@pytest.mark.parametrize("name", NOT_GELU)
def test_not_gelu(name: str, level: str) -> None:
    assert rewritten(level, Module(NOT_GELU[name]), (noise(3, 7),)).report["gelu"].hits == 0


def gate_last(x):
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def gate_first(x):
    a, b = x.split(x.shape[-1] // 2, dim=-1)
    return F.gelu(a) * b


def sliced(x):
    return x[..., : x.shape[-1] // 2] * F.gelu(x[..., x.shape[-1] // 2 :], approximate="tanh")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("function", [gate_last, gate_first, sliced], ids=["gate-last", "gate-first", "sliced"])
def test_geglu(function, level: str) -> None:
    module, x = Module(function), noise(2, 5, 12)
    got = rewritten(level, module, (x,))
    assert got.report["geglu"].hits == 1, got.report["geglu"].misses
    assert_equal(got.run(x), in_float64(module, (x,)))
    assert got.again["geglu"].hits == 0


NOT_GEGLU = {
    "another axis": (lambda x: (h := x.chunk(2, dim=1))[0] * F.gelu(h[1]), "only the last axis is fused"),
    "three parts": (lambda x: (h := x.chunk(3, dim=-1))[0] * F.gelu(h[1]), None),
    "two tensors": (lambda x: x.chunk(2, dim=-1)[0] * F.gelu((x + 1).chunk(2, dim=-1)[1]), None),
    "the same half": (lambda x: (h := x.chunk(2, dim=-1))[0] * F.gelu(h[0]), None),
}


@pytest.mark.parametrize("level", ["export", "onnx-21"])
@pytest.mark.parametrize("name", NOT_GEGLU)
def test_not_geglu(name: str, level: str) -> None:
    function, reason = NOT_GEGLU[name]
    report = rewritten(level, Module(function), (noise(2, 6, 12),)).report["geglu"]
    assert report.hits == 0
    if reason:
        assert any(reason in m.reason for m in report.misses)


def upsampled(x, w, b, **options):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, **{"padding": 1, **options})


KERNEL = {"w": noise(6, 4, 3, 3, seed=1), "b": noise(6, seed=2)}


@pytest.mark.parametrize("level", LEVELS)
def test_upsample_conv(level: str) -> None:
    module, x = Module(upsampled, **KERNEL), noise(2, 4, 5, 7)
    got = rewritten(level, module, (x,))
    assert got.report["upsample-conv"].hits == 1, got.report["upsample-conv"].misses
    assert_equal(got.run(x), in_float64(module, (x,)))
    assert got.again["upsample-conv"].hits == 0


@pytest.mark.parametrize("level", ["export", "onnx-18", "onnx-21"])
def test_upsample_to_a_size_and_a_pad_before_the_convolution(level: str) -> None:
    def function(x, w, b):
        return F.conv2d(F.pad(F.interpolate(x, size=(10, 14)), (1, 1, 1, 1)), w, b)

    module, x = Module(function, **KERNEL), noise(2, 4, 5, 7)
    got = rewritten(level, module, (x,))
    assert got.report["upsample-conv"].hits == 1, got.report["upsample-conv"].misses
    assert_equal(got.run(x), in_float64(module, (x,)))


NOT_UPSAMPLE = {
    "stride": (lambda x, w, b: upsampled(x, w, b, stride=2), "stride is (2, 2), not (1, 1)"),
    "dilation": (lambda x, w, b: upsampled(x, w, b, dilation=2), "dilation is (2, 2), not (1, 1)"),
    "no padding": (lambda x, w, b: upsampled(x, w, b, padding=0), "padding is (0, 0, 0, 0), not (1, 1, 1, 1)"),
    "threefold": (
        lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=3.0), w, b, padding=1),
        "upsampled (3, 3) times, not (2, 2)",
    ),
    "small kernel": (lambda x, w, b: upsampled(x, w[..., :1, :1], b, padding=0), "the kernel is (1, 1), not (3, 3)"),
    "bilinear": (
        lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), w, b, padding=1),
        None,
    ),
    "read twice": (
        lambda x, w, b: F.conv2d(u := F.interpolate(x, scale_factor=2.0), w, b, padding=1).sum() + u,
        "has a user outside the pattern",
    ),
}


@pytest.mark.parametrize("level", ["export", "onnx-21"])
@pytest.mark.parametrize("name", NOT_UPSAMPLE)
def test_upsample_left_alone_because(name: str, level: str) -> None:
    function, reason = NOT_UPSAMPLE[name]
    module, x = Module(function, **KERNEL), noise(2, 4, 5, 7)
    got = rewritten(level, module, (x,))
    assert got.report["upsample-conv"].hits == 0
    if reason:
        assert any(reason in m.reason for m in got.report["upsample-conv"].misses), got.report["upsample-conv"].misses
