import math
import re

import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.ops.group_norm_act import affine, reference
from hasten.passes.ops.native import build

STATS, APPLY = torch.ops.hasten.group_norm_affine, torch.ops.hasten.apply_affine


@pytest.fixture(autouse=True)
def _native():
    assert build.load() is None, "the C++ kernels are not to be had on this machine"
    torch.manual_seed(0)


def kernel(x, *operands, act="none"):
    return APPLY(x, STATS(x, *operands), act)


def operators(x, *operands, act="none"):
    return affine.apply_affine(x, affine.group_norm_affine(x, *operands), act)


def wanted(x, weight, bias, scale, shift, groups, eps, act="none"):
    return reference(x, weight, bias, scale, shift, groups, eps, act)


def allowed(want):
    return 1e-5 * (1 + want.abs())


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("form", [kernel, operators], ids=["kernel", "operators"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 64, 9, 11), 32),
        ((1, 30, 5, 7), 3),
        ((3, 8, 1, 1), 8),
        ((2, 320, 8, 8), 32),
        ((2, 6, 17), 1),
        ((1, 4, 2, 3, 5), 2),
    ],
)
def test_every_shape(form, layout, shape, groups):
    x = LAYOUTS[layout](torch.randn(shape) * 3 + 5)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    scale, shift = torch.randn(shape[0], shape[1]), torch.randn(1, shape[1])
    for operands in ((weight, bias, None, None), (None, None, scale, shift), (weight, None, None, shift)):
        for act in ("none", "silu"):
            want = wanted(x, *operands, groups, 1e-5, act)
            assert ((form(x, *operands, groups, 1e-5, act=act) - want).abs() <= allowed(want)).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [10.0, 1e3, 1e4])
def test_a_large_mean_costs_no_digits(channels_last, mean):
    x = torch.randn(2, 64, 40, 40) + mean
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    want = wanted(x, None, None, None, None, 32, 1e-5)
    assert ((kernel(x, None, None, None, None, 32, 1e-5) - want).abs() <= 1e-4 * (1 + want.abs())).all()


@pytest.mark.parametrize("channels", [2, 64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_a_first_pixel_unlike_the_others_costs_no_digits(channels, layout, eps):
    x = torch.zeros(1, channels, 1024, 1024).to(memory_format=layout)
    x[:, :, 0, 0] = 0.1
    scale = STATS(x, None, None, None, None, 2, eps)[1].double()
    mean = x.double()[0, 0].mean()
    want = ((x.double()[0, 0] - mean).square().mean() + eps).rsqrt()
    assert (scale / want - 1).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [6, 64, 200])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bands", [(1e4, -3e4, 0), (0, 0, 1e4), (1e-4, 1, 1)])
def test_bands_of_unlike_means_cost_no_digits(channels, layout, bands):
    height = torch.arange(96) * len(bands) // 96
    x = torch.randn(1, channels, 96, 33) * 1e-3 + torch.tensor(bands)[height][:, None]
    x = x.to(memory_format=layout)
    scale = STATS(x, None, None, None, None, 2, 1e-12)[1].double()
    grouped = x.double().reshape(2, -1)
    want = (grouped.var(1, correction=0) + 1e-12).rsqrt().repeat_interleave(channels // 2)
    assert (scale.flatten() / want - 1).abs().max() < 1e-6


def test_constant_input_gives_the_bias_over_the_root_of_epsilon():
    bias = torch.randn(8)
    x = torch.full((1, 8, 4, 4), 3.0)
    y = kernel(x, torch.ones(8), bias, None, None, 4, 1e-3)
    assert torch.equal(y, bias.reshape(1, 8, 1, 1).expand_as(x))
    x[0, 0, 0, 0] += 1e-3  # the variance is far below epsilon
    want = wanted(x, None, None, None, None, 4, 1e-3)
    assert (kernel(x, None, None, None, None, 4, 1e-3) - want).abs().max() < 1e-5


def test_nan_poisons_its_own_group_only():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 5, 5).to(memory_format=layout)
        x[1, 5, 2, 2] = math.nan
        y = kernel(x, None, None, None, None, 4, 1e-5)
        assert y[1, 4:6].isnan().all()
        y[1, 4:6] = 0
        assert y.isfinite().all()


def test_one_huge_outlier():
    x = torch.randn(1, 32, 16, 16)
    x[0, 3, 7, 7] = 1e6
    want = wanted(x, None, None, None, None, 8, 1e-5)
    assert ((kernel(x, None, None, None, None, 8, 1e-5) - want).abs() <= allowed(want)).all()


def test_empty_batch_and_channels_last_result():
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    assert kernel(x[:0], None, None, None, None, 4, 1e-5).shape == (0, 8, 3, 3)
    assert kernel(x, None, None, None, None, 4, 1e-5).is_contiguous(memory_format=torch.channels_last)


def test_the_same_bits_with_any_number_of_threads_for_contiguous_maps():
    x = torch.randn(2, 64, 33, 31)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernel(x, None, None, None, None, 32, 1e-5, act="silu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_messages():
    with pytest.raises(UsageError) as caught:
        STATS(torch.empty(1, 6, 2, 2, device="meta"), None, None, None, None, 4, 1e-5)
    assert str(caught.value) == "group_norm_affine: an input of shape (1, 6, 2, 2) has no 4 groups of channels"
    with pytest.raises(UsageError) as caught:
        APPLY(torch.empty(1, 6, 2, 2, device="meta"), torch.empty(3, 1, 6, device="meta"), "tanh")
    assert str(caught.value) == "apply_affine: no activation 'tanh'; give 'none' or 'silu'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "group_norm_affine: an input of shape [2, 8, 3, 3] has no 0 groups of channels"),
        ({"groups": 3}, "group_norm_affine: an input of shape [2, 8, 3, 3] has no 3 groups of channels"),
        (
            {"x": torch.ones(2, 0, 3, 3)},
            "group_norm_affine: an input of shape [2, 0, 3, 3] has no 4 groups of channels",
        ),
        ({"x": torch.ones(8)}, "group_norm_affine: an input of shape [8] has no 4 groups of channels"),
        ({"x": torch.ones(2, 8, 3, 3).half()}, "the input must be float32 on the CPU, not Half on cpu"),
        ({"weight": torch.ones(7)}, "group_norm_affine: weight has shape [7]; give [8]"),
        ({"bias": torch.ones(8, 1)}, "group_norm_affine: bias has shape [8, 1]; give [8]"),
        ({"weight": torch.ones(8).half()}, "weight must be float32 on the CPU, not Half on cpu"),
        (
            {"scale": torch.ones(3, 8)},
            "group_norm_affine: scale has shape [3, 8]; give [2, 8], with 1 allowed for both",
        ),
        ({"shift": torch.ones(8)}, "group_norm_affine: shift has shape [8]; give [2, 8], with 1 allowed for both"),
        ({"shift": torch.ones(2, 8).double()}, "shift must be float32 on the CPU, not Double on cpu"),
    ],
    ids=str,
)
def test_the_kernel_checks_its_arguments_itself(change, message):
    given = {"x": torch.ones(2, 8, 3, 3), "weight": None, "bias": None, "scale": None, "shift": None, "groups": 4}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        STATS(**given | change, eps=1e-5)


@pytest.mark.parametrize(
    ("x", "table", "act", "message"),
    [
        ((2, 8, 3), (3, 2, 8), "tanh", "apply_affine: no activation 'tanh'; give 'none' or 'silu'"),
        ((2, 8, 3), (3, 1, 8), "none", "apply_affine: the table has shape [3, 1, 8]; give [3, 2, 8]"),
        ((2, 8, 3), (2, 2, 8), "none", "apply_affine: the table has shape [2, 2, 8]; give [3, 2, 8]"),
        ((8,), (3, 1, 8), "none", "apply_affine: the input has shape [8]; give (batch, channels, ...)"),
    ],
)
def test_the_kernel_checks_what_it_applies(x, table, act, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        APPLY(torch.ones(x), torch.ones(table), act)


def test_no_backward_pass():
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    with pytest.raises(
        UsageError, match=r"hasten::(group_norm|apply)_affine has no backward pass: optimised modules are"
    ):
        kernel(x, None, None, None, None, 4, 1e-5).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_declared_as_torch_wants_it(layout):
    x = torch.randn(2, 8, 5, 5).to(memory_format=layout)
    arguments = (x, torch.randn(8), None, None, None, 4, 1e-5)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(STATS.default, arguments, test_utils=utilities)
    torch.library.opcheck(APPLY.default, (x, STATS(*arguments), "silu"), test_utils=utilities)


def test_silu_of_every_size():
    ends = torch.tensor([-math.inf, -1e38, -3.4e38, -1e30, 0.0, 1e30, 1e38, math.inf, math.nan])
    x = torch.cat([torch.linspace(-100, 100, 4001), ends]).reshape(1, 1, -1)
    y = APPLY(x, torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1), "silu")
    want = torch.nn.functional.silu(x.double())
    assert torch.equal(y.isnan(), want.isnan())
    known = want.isfinite()
    assert ((y - want).abs()[known] <= 4e-7 * want.abs()[known] + 1e-8).all()
    assert y[0, 0, -2] == math.inf
    assert y[0, 0, -9].isnan()
    assert (y[0, 0, -8:-5] == 0).all()
    assert y[0, 0, -8:-5].signbit().all()
