"""A loop's body and a branch return memory of their own in every place, also where two places hold one value."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hasten.backends import inductor
from hasten.backends.own_outputs import separate

TURNS = 3


class Twice(nn.Module):
    """(N, N) -> two of (N, N): a loop whose body, and a branch in it, return two copies of one value each."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        def going(i: Tensor, *_: Tensor) -> Tensor:
            return i < TURNS

        def even(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            made = a.sin() @ b
            return made.clone(), made.clone()

        def odd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a.clone(), b.clone()

        def row(i: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            a, b = torch.ops.higher_order.cond(i % 2 == 0, even, odd, (a, b))
            made = a.cos() @ b
            return i + 1, a + b, made.clone(), made.clone(), made.clone()

        start = (torch.zeros((), dtype=torch.int64), x, x.clone(), x.clone(), x.clone())
        _, *ends = torch.ops.higher_order.while_loop(going, row, start, ())
        return tuple(end.clone() for end in ends)


@pytest.mark.skipif(not inductor.have_cxx_compiler(), reason="no C++ compiler")
def test_a_package_returns_what_the_module_does(tmp_path: Path) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    inductor.package(Twice(), (x,), None, "cpu", tmp_path)
    with zipfile.ZipFile(tmp_path / inductor.ARTIFACT) as package:
        (code,) = (package.read(name).decode() for name in package.namelist() if name.endswith(".wrapper.cpp"))
    taken = re.findall(r"= std::move\((\w+)\)", code)
    assert len(taken) == len(set(taken)) > 0  # what is taken twice ends the process that runs it
    made = torch._inductor.aoti_load_package(str(tmp_path / inductor.ARTIFACT))(x)
    for found, expected in zip(made, Twice()(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("results", "copies"),
    [
        (lambda y: (y, y, y), 2),
        (lambda y: (y, y.flatten()), 1),
        (lambda y: (y, y + 1), 0),
        (lambda y: (y, y.clone()), 0),
    ],
)
def test_what_has_the_memory_of_an_earlier_result_is_copied(
    results: Callable[[Tensor], tuple[Tensor, ...]], copies: int
) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return results(x.sin())

    x = torch.randn(2, 3)
    traced = make_fx(function, tracing_mode="fake")(x)
    before = len(traced.graph.nodes)
    separate(traced.graph)
    traced.recompile()
    assert len(traced.graph.nodes) == before + copies
    made = traced(x)
    assert len({t.untyped_storage().data_ptr() for t in made}) == len(made)
    for found, expected in zip(made, function(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
