"""Seeds of pictures: every whole number of 64 bits, and those of before as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.solvers.seeds import LARGEST, MIXED_FROM, of_picture, of_run


@pytest.mark.parametrize("seed", [0, 1, 254, MIXED_FROM - 1])
def test_a_seed_with_room_for_a_place_stands_above_it(seed: int) -> None:
    assert [of_picture(seed, place) for place in (0, 5)] == [seed * 2**24, seed * 2**24 + 5]


def test_every_seed_makes_noise_of_its_own() -> None:
    seeds = [
        0,
        255,
        256,
        257,
        512,
        10_000,
        10_256,
        2**39,
        2**40,
        2**40 + 1,
        2**41,
        2**63 - 1,
        2**63,
        LARGEST - 1,
        LARGEST,
    ]
    drawn = [torch.randn(4, generator=torch.Generator().manual_seed(of_picture(s, p))) for s in seeds for p in (0, 1)]
    assert len({tuple(d.tolist()) for d in drawn}) == 2 * len(seeds)
    assert all(0 <= of_picture(s, 3) <= LARGEST for s in seeds)


def test_noise_in_an_engine_has_a_signed_number() -> None:
    assert [of_run(s) for s in (0, 7, 2**63 - 1)] == [0, 7, 2**63 - 1]
    large = [of_run(s) for s in (2**63, 2**63 + 1, LARGEST)]
    assert len(set(large)) == 3
    assert all(0 <= s < 2**63 for s in large)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, r"seed: -1 given; give 0 or more, up to 2\*\*64 - 1"),
        (LARGEST + 1, "seed: 18446744073709551616 given; give 0 or more"),
        (1.5, "seed: 1.5 is not a whole number"),
        (True, "seed: True is not a whole number"),
        ("1", "seed: '1' is not a whole number"),
    ],
)
def test_what_is_no_seed(seed: Any, message: str) -> None:
    for use in (of_run, lambda s: of_picture(s, 0)):
        with pytest.raises(UsageError, match=message):
            use(seed)
