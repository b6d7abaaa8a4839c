"""A package for a range of sizes holds for all of it, or is refused before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from hasten.backends import inductor
from hasten.errors import HastenError

pytestmark = pytest.mark.skipif(not inductor.have_cxx_compiler(), reason="no C++ compiler")


class Large(nn.Module):
    """(B, 3) -> the same, by other arithmetic where B is small."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x if x.shape[0] > 3 else 3 * x,)


class Even(nn.Module):
    """(B, 3) -> the same, by other arithmetic where B is odd; its inputs have no names."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        return (2 * x if x.shape[0] % 2 == 0 else 3 * x,)


class Fixed(nn.Module):
    """(4, 3) -> the same."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        return (x + torch.ones(4, 3),)


@pytest.mark.parametrize(
    ("module", "dim", "message"),
    [
        (Large(), Dim.AUTO(min=1, max=8), "input 'x' shall be 1 to 8, and the graph holds for 4 to 8 only; make the"),
        (Even(), Dim("batch", min=1, max=8), "does not hold for the whole range of its dynamic sizes: Not all values"),
        (Fixed(), Dim.AUTO(min=1, max=8), "input 'tensors_0' shall be dynamic, and the graph holds for 4 only"),
        (Fixed(), Dim("batch", min=1, max=8), "does not hold for the whole range of its dynamic sizes: .*batch"),
    ],
)
def test_a_graph_that_holds_for_fewer_sizes_is_refused(
    module: nn.Module, dim: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(HastenError, match=message):
        inductor.package(module, (torch.zeros(4, 3),), ({0: dim},), "cpu", tmp_path)
    assert not list(tmp_path.iterdir())
