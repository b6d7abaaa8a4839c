"""GroupNorm however it is written, with every activation, on every kind of graph; and what is left alone."""

from __future__ import annotations

import pytest
import torch
from graphs import FX_LEVELS, LEVELS, Module, assert_equal, in_float64, rewritten
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "silu-product": lambda y: y * torch.sigmoid(y),
    "silu-quotient": lambda y: y / (1 + torch.exp(-y)),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "none": lambda y: y,
}


def weights(channels: int = 8) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {"w": torch.randn(channels, generator=rng), "b": torch.randn(channels, generator=rng)}


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 8, 6, 5), generator=torch.Generator().manual_seed(1)) * 3 + 1


def variance_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    grouped = x.reshape(x.shape[0], 4, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    return normed.reshape(x.shape) * w[:, None, None] + b[:, None, None]


def var_mean_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    grouped = x.reshape(x.shape[0], 4, 2, -1)
    mean = grouped.mean((2, 3), keepdim=True)
    var = grouped.var((2, 3), correction=0, keepdim=True)
    return ((grouped - mean) * torch.rsqrt(var + 1e-5)).reshape(x.shape) * w[:, None, None] + b[:, None, None]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, level: str) -> None:
    act = ACTIVATIONS[name]
    module, x = Module(lambda x, w, b: act(F.group_norm(x, 4, w, b, 1e-6)), **weights()), picture()
    got = rewritten(level, module, (x,))
    report = got.report["group-norm-act"]
    assert [s.variant for s in report.sites] == [name.partition("-")[0]], report.misses
    assert report.reverted == ()
    assert_equal(got.run(x), in_float64(module, (x,)))
    assert got.again["group-norm-act"].hits == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("chain", [variance_chain, var_mean_chain], ids=["mean-square", "var"])
def test_chain(chain, level: str) -> None:
    module, x = Module(lambda x, w, b: F.silu(chain(x, w, b)), **weights()), picture()
    got = rewritten(level, module, (x,))
    assert [s.variant for s in got.report["group-norm-act"].sites] == ["silu"], got.report["group-norm-act"].misses
    assert_equal(got.run(x), in_float64(module, (x,)))


@pytest.mark.parametrize("level", LEVELS)
def test_without_affine(level: str) -> None:
    module, x = Module(lambda x: F.silu(F.group_norm(x, 4))), picture()
    got = rewritten(level, module, (x,))
    assert got.report["group-norm-act"].hits == 1
    assert_equal(got.run(x), in_float64(module, (x,)))


@pytest.mark.parametrize("level", LEVELS)
def test_scale_and_shift(level: str) -> None:
    def function(x, t, w, b):
        scale, shift = t[:, :, None, None].chunk(2, dim=1)
        return F.silu(F.group_norm(x, 4, w, b) * (1 + scale) + shift)

    module, args = Module(function, **weights()), (picture(), picture(2, 16))
    got = rewritten(level, module, args)
    assert [s.variant for s in got.report["group-norm-act"].sites] == ["silu"]
    assert not {"silu", "Sigmoid", "sigmoid"} & set(got.ops)
    assert_equal(got.run(*args), in_float64(module, args))


@pytest.mark.parametrize("shape", [(2, 8, 7), (2, 8, 3, 4, 5)], ids=["sound", "video"])
@pytest.mark.parametrize("level", ["export", "decomposed", "onnx-18", "onnx-21"])
def test_other_ranks(level: str, shape: tuple[int, ...]) -> None:
    module, x = Module(lambda x, w, b: F.silu(F.group_norm(x, 4, w, b)), **weights()), picture(*shape)
    got = rewritten(level, module, (x,))
    assert got.report["group-norm-act"].hits == 1
    assert_equal(got.run(x), in_float64(module, (x,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("level", FX_LEVELS)
def test_half_precision_has_float32_statistics(level: str, dtype: torch.dtype) -> None:
    """A mean far from zero: half-precision sums would lose the variance altogether."""
    x = (picture(1, 8, 32, 32) + 60).to(dtype)
    module = Module(lambda x, w, b: F.silu(F.group_norm(x, 4, w, b)), **{k: v.to(dtype) for k, v in weights().items()})
    got = rewritten(level, module, (x,))
    assert got.report["group-norm-act"].hits == 1
    want = in_float64(module, (x,))
    spelled = (module(x).double() - want).norm()
    fused = got.run(x)
    fused = fused[0] if isinstance(fused, tuple) else fused
    assert (fused.double() - want).norm() <= 1.05 * spelled


@pytest.mark.parametrize("level", FX_LEVELS)
def test_channels_last_stays(level: str) -> None:
    x = picture().contiguous(memory_format=torch.channels_last)
    module = Module(lambda x, w, b: F.silu(F.group_norm(x, 4, w, b)), **weights())
    got = rewritten(level, module, (x,))
    assert_equal(got.run(x), in_float64(module, (x,)))


@pytest.mark.parametrize("level", ["export", "onnx-18", "onnx-21"])
def test_norm_read_twice_keeps_its_activation_outside(level: str) -> None:
    module, x = Module(lambda x, w, b: F.silu(y := F.group_norm(x, 4, w, b)) + y.cos(), **weights()), picture()
    got = rewritten(level, module, (x,))
    report = got.report["group-norm-act"]
    assert [s.variant for s in report.sites] == ["none"]
    assert any("has a user outside the pattern" in m.reason for m in report.misses)
    assert_equal(got.run(x), in_float64(module, (x,)))


@pytest.mark.parametrize("level", ["export", "decomposed", "onnx-18"])
def test_product_with_a_map_is_not_the_norms_affine(level: str) -> None:
    module, args = Module(lambda x, y, w, b: F.group_norm(x, 4, w, b) * y + 1, **weights()), (picture(), picture())
    got = rewritten(level, module, args)
    assert [s.variant for s in got.report["group-norm-act"].sites] == ["none"]
    assert_equal(got.run(*args), in_float64(module, args))


@pytest.mark.parametrize("level", ["export", "onnx-18"])
def test_sample_variance_is_left_alone(level: str) -> None:
    def function(x):
        g = x.reshape(2, 4, -1)
        return ((g - g.mean(-1, keepdim=True)) * torch.rsqrt(g.var(-1, keepdim=True) + 1e-5)).reshape(x.shape)

    got = rewritten(level, Module(function), (picture(),))
    assert got.report["group-norm-act"].hits == 0


def test_in_place_change_between_norm_and_activation_is_respected() -> None:
    def function(x, w, b):
        x = x.clone()
        y = F.group_norm(x, 4, w, b)
        x.add_(1.0)
        return F.silu(y) + x

    module, x = Module(function, **weights()), picture()
    got = rewritten("dynamo", module, (x,))
    report = got.report["group-norm-act"]
    assert any("changes a tensor in place" in m.reason for m in report.misses)
    assert_equal(got.run(x), in_float64(module, (x,)))


def test_in_place_activation_is_part_of_the_match() -> None:
    module, x = Module(lambda x, w, b: F.silu(F.group_norm(x, 4, w, b), inplace=True), **weights()), picture()
    got = rewritten("dynamo", module, (x,))
    assert [s.variant for s in got.report["group-norm-act"].sites] == ["silu"]
    assert_equal(got.run(x), in_float64(module, (x,)))
