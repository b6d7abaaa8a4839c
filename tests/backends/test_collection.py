"""The collector of reference cycles rests while a graph is made, and is left as it was found."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hasten.backends.capture import capture
from hasten.backends.collection import collection_off
from hasten.errors import HastenError


@pytest.fixture(params=[True, False], ids=["on", "off"])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield bool(request.param)
    (gc.enable if before else gc.disable)()


def test_it_is_left_as_it_was_found(enabled: bool) -> None:
    with collection_off():
        assert not gc.isenabled()
        with collection_off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() is enabled


def test_a_capture_rests_it_and_a_failing_one_gives_it_back(enabled: bool) -> None:
    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not gc.isenabled()
            return x + 1

    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    capture(Watching(), (torch.zeros(2),))
    assert gc.isenabled() is enabled
    with pytest.raises(HastenError, match="does not run"):
        capture(Failing(), (torch.zeros(2),))
    assert gc.isenabled() is enabled
