import math

import pytest
import torch
import torch.nn.functional as F

from hasten.errors import UsageError
from hasten.passes.ops.attention import flash, reference
from hasten.passes.ops.native import build

OP = torch.ops.hasten.flash_attention
SHAPES = [  # B, H, N, M, D, Dv: remainders of vectors, of steps of keys and of channels, and of blocks
    (1, 1, 1, 1, 1, 1),
    (1, 2, 3, 5, 7, 3),
    (2, 3, 50, 77, 40, 40),
    (1, 2, 17, 9, 8, 16),
    (1, 1, 100, 130, 33, 20),
    (1, 2, 48, 64, 64, 64),
    (1, 2, 47, 63, 72, 72),
    (1, 2, 97, 129, 160, 160),
    (2, 1, 5, 257, 80, 80),
    (1, 1, 33, 1, 24, 24),
    (1, 1, 16, 8, 4, 4),
    (1, 1, 700, 200, 20, 130),
    (1, 1, 200, 70, 300, 130),  # sums over D in parts
    (1, 2, 260, 33, 512, 512),
]


@pytest.fixture(autouse=True)
def _native():
    assert build.load() is None, "the C++ kernels are not to be had on this machine"
    torch.manual_seed(0)


def operands(batch=2, heads=3, queries=50, keys=77, width=16, value_width=16):
    """As projections give them: (B, N, H, D) in memory."""
    sizes = ((queries, width), (keys, width), (keys, value_width))
    return [torch.randn(batch, rows, heads, columns).transpose(1, 2) for rows, columns in sizes]


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("form", [OP, flash.flash_attention], ids=["kernel", "operators"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(form, shape):
    q, k, v = operands(*shape)
    for scale in (shape[4] ** -0.5, 1.0):
        y = form(q, k, v, scale)
        assert y.shape == (*q.shape[:3], v.shape[3])
        assert y.transpose(1, 2).is_contiguous()
        assert error(y, reference(q, k, v, scale=scale)) < 2e-6


@pytest.mark.parametrize("width", [40, 64, 72, 80, 128, 160, 256, flash.WIDEST])
@pytest.mark.parametrize("spread", [1, 5])
def test_rounds_no_more_than_torch(width, spread):
    ours = theirs = 0.0
    for _ in range(4):
        q, k, v = operands(2, 4, 128, 300, width, width)
        scale = spread * width**-0.5
        want = reference(q, k, v, scale=scale)
        ours += error(OP(q, k, v, scale), want)
        theirs += error(F.scaled_dot_product_attention(q, k, v, scale=scale), want)
    assert ours < 1.1 * theirs


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(),
        lambda t: torch.cat([t, t], 3)[..., t.shape[3] :],
        lambda t: torch.cat([t, t], 2)[:, :, ::2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t[:1].expand(2, *t.shape[1:]),
    ],
    ids=["heads first", "slice", "every second row", "width outside", "expanded"],
)
def test_memory_layouts(layout):
    q, k, v = (layout(t) for t in operands())
    assert torch.equal(OP(q, k, v, 0.25), OP(*(t.contiguous() for t in (q, k, v)), 0.25))


def test_grouped_heads():
    (q, _, _), (_, k, v) = operands(heads=6), operands(heads=2)
    assert torch.equal(OP(q, k, v, 0.25), OP(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), 0.25))


def test_threads_give_the_same_bits():
    q, k, v = operands(1, 3, 500, 130)
    threads = torch.get_num_threads()
    try:
        made = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            made.append(OP(q, k, v, 0.25))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("scale", [1.0, -1.0, 30.0, 1e30])
def test_scores_that_grow_from_key_to_key(scale):
    """The number that scores are taken less of is raised again and again."""
    q, v = torch.ones(1, 1, 50, 8), torch.randn(1, 1, 300, 8)
    k = torch.arange(300.0).reshape(1, 1, 300, 1).expand(1, 1, 300, 8)
    assert error(OP(q, k, v, scale), reference(q, k, v, scale=scale)) < 1e-6


def test_scores_far_from_zero():
    q, k, v = operands(1, 1, 40, 90, 8, 8)
    for offset in (-3e4, 3e4):
        shifted = torch.cat([k, torch.full_like(k[..., :1], offset)], 3)
        ones = torch.cat([q, torch.ones_like(q[..., :1])], 3)
        want = reference(ones, shifted, v, scale=1.0)
        assert error(OP(ones, shifted, v, 1.0), want) < 5e-3  # 3e4 leaves a score 2^-9


def test_weights_of_every_size():
    """One query and two keys: the result is the ratio of two exponentials."""
    x = torch.linspace(-110, 110, 4001)
    q, k = torch.ones(4001, 1, 1, 1), torch.stack((torch.zeros_like(x), x), 1).reshape(-1, 1, 2, 1)
    v = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1).expand(4001, 1, 2, 1)
    got, want = OP(q, k, v, 1.0).flatten().double(), 1 / (1 + x.double().exp())
    known = want > 2.0**-125
    assert ((got - want).abs()[known] <= 2e-5 * want[known]).all()  # a score of 100 is rounded to 8e-6
    assert (got[~known] <= 2.0**-124).all()


def softmax(q, k, v, scale):
    return torch.softmax((q * scale) @ k.transpose(-1, -2), -1) @ v


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (20, 3), (49, 5), (69, 7)])
def test_nan_and_infinity_come_out_where_the_definition_has_them(value, which, row, column):
    inputs = [torch.randn(1, 2, n, 8) for n in (50, 70, 70)]
    inputs[which][0, 1, min(row, inputs[which].shape[2] - 1), column] = value
    got, want = OP(*inputs, 0.3), softmax(*inputs, 0.3)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("rows", [range(1), range(69, 70), range(8), range(64), range(70)], ids=str)
def test_keys_of_infinities(value, rows):
    """A key that every query gives -inf is not seen; if no other is left, nothing is."""
    q, k, v = torch.rand(1, 1, 50, 8), torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70, 8)
    k[:, :, list(rows)] = value
    assert torch.allclose(OP(q, k, v, 0.3), softmax(q, k, v, 0.3), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_nothing_to_attend_to_and_nobody_who_asks():
    q, k, v = operands()
    assert torch.equal(OP(q, k[:, :, :0], v[:, :, :0], 0.25), torch.zeros(2, 3, 50, 16))
    assert OP(q[:, :, :0], k, v, 0.25).shape == (2, 3, 0, 16)
    assert OP(q[:0], k[:0], v[:0], 0.25).shape == (0, 3, 50, 16)
    assert OP(q, k, v[..., :0], 0.25).shape == (2, 3, 50, 0)
    assert torch.equal(flash.flash_attention(q, k[:, :, :0], v[:, :, :0], 0.25), torch.zeros(2, 3, 50, 16))
    averages = v.mean(2, keepdim=True).expand(2, 3, 50, 16)
    assert torch.allclose(OP(q[..., :0], k[..., :0], v, 0.25), averages, atol=1e-6)  # without channels scores are 0


def test_messages():
    q, k, v = (t.to("meta") for t in operands())
    start = "flash_attention: q (2, 3, 50, 16), k "
    for changed, said in (
        ((q, k[0], v), f"{start}(3, 77, 16), v (2, 3, 77, 16); give (batch, heads, tokens, width) each"),
        (
            (q, k[..., :8], v),
            f"{start}(2, 3, 77, 8), v (2, 3, 77, 16); q and k must have the same batch and width, k and v the same "
            "heads and tokens",
        ),
        (
            (q, k[:, :2], v[:, :2]),
            f"{start}(2, 2, 77, 16), v (2, 2, 77, 16); the heads of k must divide those of q",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            OP(*changed, 0.25)
        assert str(caught.value) == said
    q, k, v = operands()
    with pytest.raises(RuntimeError, match=r"hasten::flash_attention: q has shape \[2, 3, 50, 16\], k \[2, 3, 77, 8\]"):
        OP(q, k[..., :8], v, 0.25)
    with pytest.raises(RuntimeError, match="hasten: k must be float32 on the CPU, not Double on cpu"):
        OP(q, k.double(), v, 0.25)


def test_declared_as_torch_wants_it():
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(OP.default, (*operands(), 0.25), test_utils=utilities)
    torch.library.opcheck(OP.default, (*(t.contiguous() for t in operands()), 0.25), test_utils=utilities)
