"""Quantiles of a compiled loop are those of `torch.quantile`, and what is done with them is what the host does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.passes.fx.clean_hook import clipped, thresholded
from hasten.passes.solvers.hooks import Clip, Threshold


@pytest.mark.parametrize("size", [1, 2, 7, 256, 16384])
@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.5, 0.75, 0.995, 0.9999, 1.0])
def test_the_quantile_is_that_of_torch(size: int, ratio: float) -> None:
    x = 4 * torch.randn(3, 1, size, generator=torch.Generator().manual_seed(size))
    hook = Threshold(ratio, 100.0)
    made = thresholded(x, torch.tensor(ratio), torch.tensor(100.0), hook.top(size))
    torch.testing.assert_close(made, hook(x), rtol=1e-6, atol=1e-6)
    assert 1 <= hook.top(size) <= size


@pytest.mark.parametrize("ratio", [0.9, 0.95, 0.995, 1.0])
def test_higher_ratios_need_no_more_values(ratio: float) -> None:
    x = 4 * torch.randn(2, 3, 11, 5, generator=torch.Generator().manual_seed(1))
    made = thresholded(x, torch.tensor(ratio), torch.tensor(2.0), Threshold(0.9).top(165))
    torch.testing.assert_close(made, Threshold(ratio, 2.0)(x), rtol=1e-6, atol=1e-6)


def test_each_sample_has_its_own() -> None:
    x = torch.stack([torch.full((1, 4), 0.5), torch.full((1, 4), -2.0), torch.full((1, 4), 9.0)])
    made = thresholded(x, torch.tensor(0.5), torch.tensor(3.0), Threshold(0.5).top(4))
    assert made.flatten(1)[:, 0].tolist() == [0.5, -1.0, 1.0]


def test_values_that_are_alike() -> None:
    x = torch.ones(1, 100)
    made = thresholded(x * 2, torch.tensor(0.995), torch.tensor(8.0), Threshold(0.995).top(100))
    assert torch.equal(made, x)


def test_clipping_takes_any_limit() -> None:
    x = torch.tensor([[-3.0, -0.5, 0.0, 2.0]])
    for limit in (0.5, 1.0, 2.5):
        assert torch.equal(clipped(x, torch.tensor(limit)), Clip(limit)(x))
    assert torch.equal(clipped(x, torch.tensor(np.inf)), x)
