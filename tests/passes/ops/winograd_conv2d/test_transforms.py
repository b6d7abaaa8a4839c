"""The matrices of F(m, r): exact, as published (Lavin and Gray 2015), and as far off in low precision as predicted."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from hasten.errors import UsageError
from hasten.passes.ops.winograd_conv2d.transforms import POINTS, RHO, transform
from hasten.passes.ops.winograd_conv2d.weights import matrix, phase_taps, plain_weight

LAVIN = tuple(map(Fraction, (0, 1, -1, 2, -2)))
UNEVEN = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2))

# F(2, 3), F(4, 3) with Lavin and Gray's points, F(4, 3) with reciprocal points: A^T, G, B^T, one row a line.
SPECIFIED = {
    (2, POINTS[2, 3]): (
        "1 1 1 0; 0 1 -1 1",
        "1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1",
        "1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 -1 0 1",
    ),
    (4, LAVIN): (
        "1 1 1 1 1 0; 0 1 -1 2 -2 0; 0 1 1 4 4 0; 0 1 -1 8 -8 1",
        "1/4 0 0; -1/6 -1/6 -1/6; -1/6 1/6 -1/6; 1/24 1/12 1/6; 1/24 -1/12 1/6; 0 0 1",
        "4 0 -5 0 1 0; 0 -4 -4 1 1 0; 0 4 -4 -1 1 0; 0 -2 -1 2 1 0; 0 2 -1 -2 1 0; 0 4 0 -5 0 1",
    ),
    (4, POINTS[4, 3]): (
        "1 1 1 1 1 0; 0 2/3 -2/3 3/2 -3/2 0; 0 4/9 4/9 9/4 9/4 0; 0 8/27 -8/27 27/8 -27/8 1",
        "1 0 0; -81/130 -27/65 -18/65; -81/130 27/65 -18/65; 8/65 12/65 18/65; 8/65 -12/65 18/65; 0 0 1",
        "1 0 -97/36 0 1 0; 0 -3/2 -9/4 2/3 1 0; 0 3/2 -9/4 -2/3 1 0; 0 -2/3 -4/9 3/2 1 0; 0 2/3 -4/9 -3/2 1 0; "
        "0 1 0 -97/36 0 1",
    ),
}


def rows(text):
    return tuple(tuple(map(Fraction, line.split())) for line in text.split(";"))


def signed(g, bt):
    """Rows of G and B^T with the signs that make G's first entry positive: both may be turned together."""
    signs = [next(1 if x > 0 else -1 for x in row if x) for row in g]
    return tuple(tuple(tuple(s * x for x in row) for s, row in zip(signs, m, strict=True)) for m in (g, bt))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("m", "r"), POINTS)
def test_it_is_the_correlation_exactly(m, r, normalised):
    f = transform(m, r, normalised=normalised)
    assert (len(f.bt), len(f.g), len(f.at), f.t) == (m + r - 1, m + r - 1, m, m + r - 1)
    for i, j, s in ((i, j, s) for i in range(m) for j in range(r) for s in range(f.t)):
        weight = sum(f.at[i][k] * f.g[k][j] * f.bt[k][s] for k in range(f.t))
        assert weight == (s == i + j), (i, j, s)


@pytest.mark.parametrize(("m", "points"), SPECIFIED)
def test_the_matrices_are_lavin_and_gray_s_and_those_of_reciprocal_points_up_to_common_signs(m, points):
    at, g, bt = map(rows, SPECIFIED[m, points])
    f = transform(m, 3, points)
    assert f.at == at
    assert signed(f.g, f.bt) == signed(g, bt)


@pytest.mark.parametrize(
    ("m", "points", "kappa"),
    [(2, None, 1.667), (4, None, 4.76), (6, None, 20.63), (4, LAVIN, 10.77), (4, UNEVEN, 6.94)],
)
def test_kappa_of_every_size_and_of_other_points(m, points, kappa):
    assert transform(m, 3, points).kappa == pytest.approx(kappa, rel=1e-3)


@pytest.mark.parametrize(("m", "r"), POINTS)
def test_normalised_rows_have_an_l1_norm_of_one_and_cost_no_digits(m, r):
    f = transform(m, r, normalised=True)
    assert [sum(map(abs, row)) for row in f.bt] == [1] * f.t
    assert f.kappa == pytest.approx(transform(m, r).kappa, rel=1e-12)
    assert f.at == transform(m, r).at


def test_without_it_large_float16_maps_overflow():
    grown = {m: max(sum(map(abs, row)) for row in transform(m, 3, p).bt) ** 2 for m, p in ((4, LAVIN), (6, None))}
    assert grown == {4: 100, 6: pytest.approx(225, rel=0.01)}


def test_unknown_sizes_and_wrong_points_are_refused_with_what_to_give():
    with pytest.raises(UsageError) as unknown:
        transform(5, 3)
    assert str(unknown.value) == (
        "winograd: no interpolation points for F(5, 3); give them, or take one of F(2, 3), F(4, 3), F(6, 3), F(2, 2), "
        "F(4, 2)"
    )
    for points in (LAVIN[:4], (*LAVIN[:4], LAVIN[0]), (*LAVIN, Fraction(3))):
        with pytest.raises(UsageError) as wrong:
            transform(4, 3, points)
        assert str(wrong.value) == (f"winograd: F(4, 3) takes 5 different points and infinity, not {len(points)}")


def measured(m, r, dtype, points=None):
    """Relative rms error over gaussian tiles and weights, 64 channels, V and U rounded and nothing else."""
    generator = torch.Generator().manual_seed(0)
    f = transform(m, r, points)
    bt, g, at = map(matrix, (f.bt, f.g, f.at))
    x = torch.randn(200, 64, f.t, f.t, generator=generator, dtype=torch.float64)
    w = torch.randn(64, 64, r, r, generator=generator, dtype=torch.float64)
    v = torch.einsum("ij,pcjk,lk->ilpc", bt, x, bt).to(dtype).double()
    u = torch.einsum("ij,ocjk,lk->ilco", g, w, g).to(dtype).double()
    y = torch.einsum("ij,jkpo,lk->poil", at, v @ u, at)
    exact = F.conv2d(x, w)
    return math.sqrt((y - exact).square().mean() / exact.square().mean())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("m", "r", "points"), [*((m, r, None) for m, r in POINTS), (4, 3, LAVIN), (4, 3, UNEVEN)])
def test_the_measured_error_is_the_closed_form_s(m, r, points, dtype):
    expected = transform(m, r, points).expected_error(dtype)
    assert measured(m, r, getattr(torch, dtype), points) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("m", "r"), POINTS)
def test_the_measured_float32_error_is_below_the_closed_form_s(m, r):
    # RHO has 2^-24 / sqrt(3), the error just above a power of two; over a whole binade it is a quarter less.
    binade = RHO["float32"] * math.sqrt(0.75 / (2 * math.log(2)))
    expected = transform(m, r).kappa * math.sqrt(2) * binade
    assert measured(m, r, torch.float32) == pytest.approx(expected, rel=0.1)
    assert measured(m, r, torch.float32) <= transform(m, r).expected_error("float32")


@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_plain_weights_are_g_w_g_in_order_of_phase_row_and_column(phases, normalised):
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = plain_weight(weight.float(), 4, phases, normalised=normalised)
    f = transform(4, 2 if phases else 3, normalised=normalised)
    assert (u.shape, u.dtype) == ((f.t**2 * (4 if phases else 1), 2, 3), torch.float64)
    g = matrix(f.g)
    taps = phase_taps(weight.float().double()) if phases else weight.float().double()[None]
    for p, (i, j) in ((p, divmod(k, f.t)) for p in range(len(taps)) for k in (1, f.t + 2)):
        expected = torch.einsum("j,ocjk,k->co", g[i], taps[p], g[j])
        torch.testing.assert_close(u[(p * f.t + i) * f.t + j], expected)


def test_the_taps_of_a_phase_are_those_that_meet_on_one_pixel():
    taps = phase_taps(torch.tensor([[1.0, 10, 100], [1000, 1e4, 1e5], [1e6, 1e7, 1e8]]).reshape(1, 1, 3, 3))
    assert taps[0, 0, 0].tolist() == [[1, 110], [1001000, 110110000]]
    assert taps[1, 0, 0].tolist() == [[11, 100], [11011000, 100100000]]
    assert taps[2, 0, 0].tolist() == [[1001, 110110], [1000000, 110000000]]
