"""``torch.compile(model, backend="hasten")``: sizes that change, graph breaks, branches, modes and types of numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dynamo_block import BLOCK_HITS, OTHER_TYPES_HITS, X, draw, spelled_gelu
from in_eager import BACKENDS, hits, relative_error, rewritten, traced
from torch import nn

from hasten.backends import dynamo

pytestmark = pytest.mark.usefixtures("cleared_dynamo", "quiet_dynamo")


# Sizes that change


@pytest.mark.parametrize("name", BACKENDS)
def test_a_marked_size_is_compiled_once(block: nn.Module, name: str) -> None:
    compiled = torch.compile(block, backend=BACKENDS[name], fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = draw(batch, 16, 8, 8, seed=batch)
            torch._dynamo.mark_dynamic(x, 0)
            assert relative_error([block(x)], [compiled(x)]) < 1e-5
    assert dict(dynamo.counters) == {"compiled": 1}
    assert hits() == BLOCK_HITS


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_size_makes_it_dynamic(block: nn.Module, name: str) -> None:
    compiled = torch.compile(block, backend=BACKENDS[name])
    with torch.no_grad():
        for size in (8, 12, 6, 10):
            x = draw(2, 16, size, size, seed=size)
            assert relative_error([block(x)], [compiled(x)]) < 1e-5
    assert dict(dynamo.counters) == {"compiled": 2}
    assert hits() == {name: 2 * count for name, count in BLOCK_HITS.items()}


def test_inductor_compiles_dynamic_sizes_once(block: nn.Module) -> None:
    compiled = torch.compile(block, backend="hasten", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 16, 8, 6), (3, 16, 6, 10)):
            x = draw(*shape)
            assert relative_error([block(x)], [compiled(x)]) < 1e-5
    assert dict(dynamo.counters) == {"compiled": 1}
    assert hits() == BLOCK_HITS


def test_upsampling_of_dynamic_sizes() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)

    def up(x):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    compiled = torch.compile(up, backend=traced, dynamic=True)
    for size in (5, 8):
        x = draw(2, 4, size, size + 1)
        assert relative_error([up(x)], [compiled(x)]) < 1e-5
    assert dict(dynamo.counters) == {"compiled": 1}
    assert hits() == {"upsample-conv": 1}


# Several graphs, branches, modes, types, layouts


def test_each_side_of_a_graph_break(block: nn.Module) -> None:
    def function(x):
        x = block(x)
        torch._dynamo.graph_break()
        return block(10 * x)

    with torch.no_grad():
        got = torch.compile(function, backend=rewritten)(X)
    assert relative_error([function(X)], [got]) < 1e-5
    assert dict(dynamo.counters) == {"compiled": 2}
    assert [r["attention"].hits for r in dynamo.reports] == [1, 1]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(function, backend=rewritten, fullgraph=True)(X)


@pytest.mark.parametrize("name", BACKENDS)
def test_branches_of_cond_are_rewritten(name: str) -> None:
    norm = nn.GroupNorm(4, 16).requires_grad_(False)

    def function(x, flag):
        return torch.cond(flag, lambda x: F.silu(norm(x)), lambda x: F.gelu(norm(x)) + spelled_gelu(x), (x,))

    compiled = torch.compile(function, backend=BACKENDS[name], fullgraph=True)
    for flag in (torch.tensor(True), torch.tensor(False)):
        assert relative_error([function(X, flag)], [compiled(X, flag)]) < 1e-5
    assert hits() == {"gelu": 1, "group-norm-act": 2}
    assert [s.variant for s in dynamo.reports[0]["group-norm-act"].sites] == ["silu", "gelu"]
    assert dict(dynamo.counters) == {"compiled": 1}


def test_inductor_compiles_rewritten_branches() -> None:
    norm = nn.GroupNorm(4, 16).requires_grad_(False)

    def function(x, flag):
        return torch.cond(flag, lambda x: F.silu(norm(x)), lambda x: x * 2, (x,))

    compiled = torch.compile(function, backend="hasten", fullgraph=True)
    for flag in (torch.tensor(True), torch.tensor(False)):
        assert relative_error([function(X, flag)], [compiled(X, flag)]) < 1e-5
    assert hits() == {"group-norm-act": 1}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(block: nn.Module, mode) -> None:
    with mode():
        got = torch.compile(block.requires_grad_(True), backend=traced)(X)
        assert relative_error([block(X)], [got]) < 1e-5
    assert hits() == BLOCK_HITS


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(block: nn.Module, name: str, where: str) -> None:
    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    function = block if where == "around" else inside
    compiled = torch.compile(function, backend=BACKENDS[name], fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        want, got = function(X), compiled(X)
    assert want.dtype == got.dtype == torch.bfloat16
    assert relative_error([want], [got]) < 2e-2
    assert hits() == OTHER_TYPES_HITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types(block: nn.Module, dtype: torch.dtype) -> None:
    model, x = block.to(dtype), X.to(dtype)
    with torch.no_grad():
        got = torch.compile(model, backend=traced)(x)
    assert got.dtype == dtype
    assert relative_error([model(x)], [got]) < {torch.float64: 1e-12}.get(dtype, 1e-2)
    assert hits() == OTHER_TYPES_HITS


def test_inductor_compiles_bfloat16(block: nn.Module) -> None:
    want = block.double()(X.double())
    model, x = block.bfloat16(), X.bfloat16()
    with torch.no_grad():
        eager, got = model(x), torch.compile(model, backend="hasten")(x)
    assert got.dtype == torch.bfloat16
    assert relative_error([want], [got.double()]) <= 1.2 * relative_error([want], [eager.double()])


def test_inductor_compiles_channels_last(block: nn.Module) -> None:
    model, x = block.to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = torch.compile(model, backend="hasten")(x)
        assert relative_error([block(X)], [got]) < 1e-5
    assert hits() == BLOCK_HITS


@pytest.mark.parametrize("shape", [(2, 2), (4,)], ids=["2x2", "4"])
def test_inductor_compiles_norms_of_a_few_pixels(shape: tuple[int, ...]) -> None:
    """Sums of fewer than eight pixels are unrolled, and what follows went wrong (pytorch #185702)."""
    norm, x = nn.GroupNorm(8, 64).requires_grad_(False), draw(2, 64, *shape)
    got = torch.compile(lambda x: F.silu(norm(x)), backend="hasten")(x)
    assert relative_error([F.silu(norm(x))], [got]) < 1e-5
    assert hits() == {"group-norm-act": 1}


def test_inductor_prints_powers_of_negative_numbers() -> None:
    """FX prints ``(-1) ** x`` as ``-1 ** x`` (pytorch #197894): AutoencoderKLCosmos depends on it."""

    def function(x):
        return spelled_gelu(x) * ((-1) ** torch.arange(8))

    compiled = torch.compile(function, backend="hasten", fullgraph=True)
    assert relative_error([function(X)], [compiled(X)]) < 1e-5
    assert hits() == {"gelu": 1}
