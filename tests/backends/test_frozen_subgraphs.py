"""Weights of loops' bodies and branches are laid out as those outside are, and stored once."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hasten.backends import frozen_subgraphs, inductor

pytestmark = pytest.mark.skipif(not inductor.have_cxx_compiler(), reason="no C++ compiler")
WIDTH, TURNS = 96, 3


class Block(nn.Module):
    """(B, 96, 8, 8) -> the same; a convolution, two linear layers and an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).movedim(1, -1).reshape(-1, WIDTH)
        made = self.down(nn.functional.gelu(self.up(rows)))
        return x + 0.1 * made.reshape(len(x), *x.shape[2:], WIDTH).movedim(-1, 1)


class Loop(nn.Module):
    """The block again and again; every other time in a branch, each with a call of its own, if ``branches``."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.block, self.branches = Block(), branches

    def forward(self, x: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        weights = self.block.state_dict(keep_vars=True)

        def call(x: Tensor, *values: Tensor) -> Tensor:
            made: Tensor = functional_call(self.block, dict(zip(weights, values, strict=True)), (x,))
            return made.clone(memory_format=torch.contiguous_format)

        def going(i: Tensor, x: Tensor, count: Tensor, *values: Tensor) -> Tensor:
            return i < count

        def again(i: Tensor, x: Tensor, count: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
            if not self.branches:
                return i + 1, call(x, *values)
            (made,) = torch.ops.higher_order.cond(
                i % 2 == 0, lambda x, *v: (call(x, *v),), lambda x, *v: (-call(-x, *v),), (x, *values)
            )
            return i + 1, made

        start = (torch.zeros((), dtype=torch.int64), x)
        return torch.ops.higher_order.while_loop(going, again, start, (count, *weights.values()))[1:]

    def expected(self, x: Tensor) -> Tensor:
        for i in range(TURNS):
            x = -self.block(-x) if self.branches and i % 2 else self.block(x)
        return x


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "branches in a loop"])
def compiled(request: Any, tmp_path_factory: Any) -> tuple[Loop, Path]:
    folder = tmp_path_factory.mktemp("package")
    model = Loop(branches=request.param).eval()
    inputs = (torch.randn(1, WIDTH, 8, 8), torch.tensor(TURNS))
    inductor.package(model, inputs, None, "cpu", folder)
    return model, folder / inductor.ARTIFACT


def test_the_numbers_are_those_of_eager(compiled: tuple[Loop, Path]) -> None:
    model, path = compiled
    x = torch.randn(1, WIDTH, 8, 8)
    with torch.no_grad():
        made = torch._inductor.aoti_load_package(str(path))(x, torch.tensor(TURNS))
        torch.testing.assert_close(made[0], model.expected(x), rtol=1e-5, atol=1e-5)
        (unchanged,) = torch._inductor.aoti_load_package(str(path))(x, torch.tensor(0))
        torch.testing.assert_close(unchanged, x, rtol=0, atol=0)


def code(path: Path) -> str:
    """The package's program in C++."""
    with zipfile.ZipFile(path) as package:
        (found,) = (package.read(name).decode() for name in package.namelist() if name.endswith(".wrapper.cpp"))
    return found


def test_layers_inside_run_on_weights_that_were_laid_out(compiled: tuple[Loop, Path]) -> None:
    model, path = compiled
    calls = re.findall(r"aoti_torch_cpu_(\w+)\(", code(path))
    count = 2 if model.branches else 1
    assert [c for c in calls if "mm" in c.split("_") or "addmm" in c or c == "convolution"] == []
    assert len([c for c in calls if "linear_pointwise" in c]) == 2 * count
    assert len([c for c in calls if "convolution_pointwise" in c]) == count


def test_weights_are_stored_once(compiled: tuple[Loop, Path]) -> None:
    model, path = compiled
    size = sum(t.nbytes for t in model.state_dict().values())
    stored = sum(int(n) for n in re.findall(r"constants_info_\[\d+\]\.data_size = (\d+)", code(path)))
    assert size <= stored < 1.1 * size


def test_another_torch_is_told_and_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import freezing, pattern_matcher

    monkeypatch.delattr("torch._inductor.graph.GraphLowering.allocate_non_dup_const_name")
    passes, lower = freezing.freezing_passes, pattern_matcher.LoweringPatternEntry.apply
    with caplog.at_level("WARNING"), frozen_subgraphs.frozen_subgraphs():
        assert (freezing.freezing_passes, pattern_matcher.LoweringPatternEntry.apply) == (passes, lower)
    assert "has no graph:GraphLowering.allocate_non_dup_const_name" in caplog.text
