"""Noise from a seed and a counter: unit normal, without visible structure, and the same numbers anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.passes.fx.counter_noise import PRIME, _permuted, normal

LIKE = torch.empty(4, 64, 64)


def drawn(seed: int, counter: int) -> torch.Tensor:
    return normal(torch.tensor(seed), torch.tensor(counter), LIKE)


def test_the_same_arithmetic_in_python_integers() -> None:
    """Nothing overflows: exact integers give the same residues."""

    def permuted(x: int, key: int) -> int:
        from hasten.passes.fx.counter_noise import _CONSTANTS

        for constant in _CONSTANTS:
            x = pow(x + key + constant, 5, PRIME)
        return (x + key) % PRIME

    numbers = [0, 1, 2, 12345, PRIME - 1]
    for key in (0, 7, PRIME - 1):
        assert _permuted(torch.tensor(numbers), torch.tensor(key)).tolist() == [permuted(n, key) for n in numbers]


def test_a_key_permutes() -> None:
    made = _permuted(torch.arange(200_000), torch.tensor(5))
    assert len(made.unique()) == 200_000


@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (0, 1), (1, 0), (2**40 + 1, 17)])
def test_it_is_unit_normal(seed: int, counter: int) -> None:
    z = drawn(seed, counter).double()
    count = z.numel()
    assert abs(float(z.mean())) < 4 / count**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((z**3).mean())) < 4 * (15 / count) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    # the chi-square statistic of 64 equally likely bins: mean 63, deviation sqrt(126)
    bins = torch.histc(0.5 * (1 + torch.erf(z / 2**0.5)), 64, 0, 1)
    assert abs(float(((bins - count / 64) ** 2 / (count / 64)).sum()) - 63) < 4 * 126**0.5


def test_neighbours_and_other_draws_are_unrelated() -> None:
    z = [drawn(*key).double().flatten() for key in ((0, 0), (0, 1), (1, 0), (2**31 - 1, 0), (2**31, 0))]
    limit = 4 / len(z[0]) ** 0.5
    for lag in (1, 2, 64, 4096):
        assert abs(float((z[0][lag:] * z[0][:-lag]).mean())) < limit
        assert abs(float((z[0][lag:].abs() - 0.798).mul(z[0][:-lag].abs() - 0.798).mean())) < limit
    for i in range(5):
        for j in range(i):
            assert abs(float((z[i] * z[j]).mean())) < limit
    spectrum = np.abs(np.fft.fft2(drawn(0, 0)[0].double().numpy())) ** 2 / 4096
    assert spectrum.max() < 20  # of exponential variables with mean 1; the largest of 4096 is above 20 once in 10^5


def test_every_draw_is_finite() -> None:
    assert bool(torch.cat([drawn(0, row).flatten() for row in range(50)]).isfinite().all())
