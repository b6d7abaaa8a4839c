import gc
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hasten.errors import UsageError
from hasten.passes.choice import Layer
from hasten.passes.ops import winograd_conv2d as wino
from hasten.passes.ops.native import build
from hasten.passes.ops.winograd_conv2d import select
from hasten.passes.ops.winograd_conv2d.weights import plain_weight, unpack

OP = torch.ops.hasten.winograd_conv2d
SIZES = [(1, 1), (2, 3), (5, 7), (8, 8), (13, 30), (4, 150)]
FORMS = [(2, False), (4, False), (6, False), (2, True), (4, True)]
ROUNDING = {2: 6e-7, 4: 1.5e-6, 6: 6e-6}


@pytest.fixture(autouse=True)
def _native():
    assert build.load() is None, "the C++ kernels are not to be had on this machine"
    torch.manual_seed(0)


def tensors(batch=2, channels=20, outputs=40, height=8, width=8):
    weight = torch.randn(outputs, channels, 3, 3) / math.sqrt(9 * channels)
    return torch.randn(batch, channels, height, width), weight, torch.randn(outputs)


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def kernel(x, weight, bias=None, norm=None, other=None, *, tile=4, phases=False, **more):
    return OP(x, weight, bias, norm, other, weight.shape[0], tile, phases, **more)


def operators(x, weight, bias=None, norm=None, other=None, *, tile=4, phases=False, **more):
    return wino.winograd_conv2d(x, weight, bias, norm, other, weight.shape[0], tile, phases, **more)


BOTH = pytest.mark.parametrize("form", [kernel, operators], ids=["kernel", "operators"])


@BOTH
@pytest.mark.parametrize(("tile", "phases"), FORMS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sizes(form, tile, phases, height, width):
    x, weight, bias = tensors(height=height, width=width)
    y = form(x, weight, bias, tile=tile, phases=phases)
    want = wino.reference(x, weight, bias, phases=phases)
    assert y.shape == want.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, want) < ROUNDING[tile]


@BOTH
@pytest.mark.parametrize("channels", [1, 3, 16, 33, 200])
@pytest.mark.parametrize("outputs", [1, 3, 32, 40])
def test_any_number_of_channels(form, channels, outputs):
    x, weight, bias = tensors(channels=channels, outputs=outputs, height=6, width=9)
    assert error(form(x, weight, bias), wino.reference(x, weight, bias)) < ROUNDING[4]


@BOTH
@pytest.mark.parametrize("mode", wino.MODES)
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 0, 0, 0), (0, 2, 1, 0), (2, 2, 2, 2)])
def test_padding(form, mode, padding):
    x, weight, bias = tensors(height=7, width=9)
    y = form(x, weight, bias, padding=padding, padding_mode=mode)
    want = wino.reference(x, weight, bias, padding=padding, padding_mode=mode)
    assert y.shape == want.shape
    assert error(y, want) < ROUNDING[4]


@BOTH
@pytest.mark.parametrize(("tile", "phases"), [(4, False), (4, True)])
def test_everything_around_it_in_one_pass(form, tile, phases):
    """The border is zero after the activation, not the activation of the shift."""
    x, weight, bias = tensors(height=5, width=6)
    norm = torch.randn(3, 2, 20)
    size = (10, 12) if phases else (5, 6)
    others = (None, torch.randn(2, 40, 1, 1), torch.randn(1, 40, 1, 1), torch.randn(2, 40, *size))
    for other in (*others, others[-1].to(memory_format=torch.channels_last)):
        for act_in, act_out in (("silu", "none"), ("none", "silu"), ("silu", "silu")):
            more = {"phases": phases, "act_in": act_in, "act_out": act_out}
            y = form(x, weight, bias, norm, other, tile=tile, **more)
            assert error(y, wino.reference(x, weight, bias, norm, other, **more)) < ROUNDING[tile]


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, 20:],
        lambda x: F.pad(x, (3, 1, 2, 2))[:, :, 2:-2, 3:-1],
    ],
    ids=["contiguous", "channels-last", "transposed", "channel slice", "cut out"],
)
def test_memory_layouts(layout):
    x, weight, bias = tensors(height=9, width=11)
    assert torch.equal(kernel(layout(x), weight, bias), kernel(x, weight, bias))


@BOTH
def test_strips_and_threads_give_the_same_bits(form):
    """How tiles are shared out among chunks and threads changes nothing of any tile."""
    x, weight, bias = tensors(channels=32, height=40, width=37)
    whole = form(x, weight, bias, workspace=1 << 30)
    assert torch.equal(form(x, weight, bias, workspace=1), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(form(x, weight, bias), form(x, weight, bias, workspace=1))
            if form is kernel:
                assert torch.equal(form(x, weight, bias), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("tile", "phases"), FORMS)
def test_weights_are_transformed_in_float64(tile, phases):
    _, weight, _ = tensors(channels=21, outputs=37)
    made = torch.ops.hasten.winograd_weight(weight, tile, phases)
    exact = plain_weight(weight, tile, phases)
    assert ((unpack(made, 21, 37) - exact).abs() <= 2.0**-24 * exact.abs() * (1 + 1e-6)).all()  # rounded once
    assert made.shape == torch.ops.hasten.winograd_weight(weight.to("meta"), tile, phases).shape


@pytest.mark.parametrize(("tile", "phases"), FORMS)
def test_transformed_weights_give_the_same_bits(tile, phases):
    x, weight, bias = tensors()
    made = torch.ops.hasten.winograd_weight(weight, tile, phases)
    assert torch.equal(
        OP(x, made, bias, None, None, 40, tile, phases), OP(x, weight, bias, None, None, 40, tile, phases)
    )


def test_changed_weights_are_transformed_again():
    x, weight, bias = tensors()
    first = kernel(x, weight, bias)
    weight.mul_(2)  # the version counter tells
    assert error(kernel(x, weight, bias), wino.reference(x, weight, bias)) < ROUNDING[4]
    weight.data.mul_(0.5)  # it does not: the hash does
    assert torch.equal(kernel(x, weight, bias), first)
    weight.data = torch.randn_like(weight)
    assert error(kernel(x, weight, bias), wino.reference(x, weight, bias)) < ROUNDING[4]


@pytest.mark.parametrize("channels", [40, 320], ids=["all numbers are hashed", "some of every output"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_changed_filter_is_noticed(channels, layout):
    x, weight, _ = tensors(channels=channels, outputs=320, height=4, width=4)
    weight = weight.to(memory_format=layout)
    assert (weight.numel() <= 1 << 18) == (channels == 40)
    for index in (0, 7, 150, 319):
        kernel(x, weight)
        weight.data[index].mul_(-1)  # no version is counted
        assert error(kernel(x, weight), wino.reference(x, weight)) < ROUNDING[4]


def test_one_changed_number_of_a_small_weight_is_noticed():
    x, weight, _ = tensors(channels=20, outputs=41, height=4, width=4)
    for index in (0, 1, 100, 3001, weight.numel() - 1):
        kernel(x, weight)
        weight.data.view(-1)[index] = 50
        assert error(kernel(x, weight), wino.reference(x, weight)) < ROUNDING[4]


def test_weights_in_a_memory_that_was_freed():
    x, _, bias = tensors()
    for _ in range(20):  # the allocator hands out the same address again and again
        weight = torch.randn(40, 20, 3, 3)
        assert error(kernel(x, weight, bias), wino.reference(x, weight, bias)) < ROUNDING[4]
        del weight
        gc.collect()


def test_two_convolutions_share_a_weight():
    x, weight, bias = tensors()
    small, large = kernel(x, weight, bias, tile=2), kernel(x, weight, bias, tile=4)
    assert torch.equal(kernel(x, weight, bias, tile=2), small)
    assert torch.equal(kernel(x, weight, bias, tile=4), large)


def test_empty_batches_and_maps():
    x, weight, bias = tensors()
    for form in (kernel, operators):
        assert form(x[:0], weight, bias).shape == (0, 40, 8, 8)
        assert form(x[:, :, :0], weight, bias, padding=(1, 1, 1, 1)).shape == (2, 40, 0, 8)


def test_a_large_offset_stays_within_the_bound_of_the_operands():
    """With a kernel that sums to zero the relative error is unbounded; that of the operands' product is not."""
    x, weight, _ = tensors(channels=64)
    x, weight = x + 1000, weight - weight.mean((2, 3), keepdim=True)
    off = (kernel(x, weight).double() - wino.reference(x, weight)).abs().max()
    assert off < 1e-5 * x.abs().max() * weight.abs().sum((1, 2, 3)).max()


def test_nan_and_infinity_reach_at_least_what_they_reach_directly():
    x, weight, bias = tensors(height=12, width=12)
    x[0, 3, 5, 5], x[1, 2, 0, 11] = math.nan, math.inf
    direct, y = F.conv2d(x, weight, bias, padding=1), kernel(x, weight, bias)
    assert not y[~direct.isfinite()].isfinite().any()
    assert y[0, :, 8:].isfinite().all()  # and not beyond their tiles


def test_results_are_not_overwritten_by_later_calls():
    x, weight, bias = tensors(batch=1, channels=32, outputs=64, height=96, width=96)  # kept memory begins at 1 MiB
    first = kernel(x, weight, bias)
    copy = first.clone()
    for _ in range(3):
        kernel(x + 1, weight, bias)
    assert torch.equal(first, copy)


@pytest.mark.parametrize(
    ("dtype", "tile", "channels"), [(torch.float32, 4, 512), (torch.float32, 2, 128), (torch.float32, 6, 128)]
)
def test_error_is_as_expected(dtype, tile, channels):
    from hasten.passes.ops.winograd_conv2d.transforms import transform

    x = F.silu(torch.randn(1, channels, 24, 24))
    weight = torch.randn(64, channels, 3, 3) / math.sqrt(9 * channels)
    got = error(kernel(x, weight, tile=tile), wino.reference(x, weight))
    assert got == pytest.approx(transform(tile, 3).expected_error("float32", channels), rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 3}, "winograd_conv2d: no tile of 3 for a 3x3 convolution; tiles: 2, 4, 6"),
        (
            {"tile": 6, "phases": True},
            "winograd_conv2d: no tile of 6 for the phases of an upsampled map; tiles: 2, 4",
        ),
        ({"padding": (1, 1)}, "winograd_conv2d: padding is [1, 1]; give [top, left, bottom, right]"),
        (
            {"padding_mode": "wrap"},
            "winograd_conv2d: padding_mode 'wrap' is none of zeros, reflect, replicate, circular",
        ),
        ({"act_in": "gelu"}, "winograd_conv2d: no activation 'gelu'; give 'none' or 'silu'"),
        (
            {"phases": True, "padding": (0, 0, 0, 0)},
            "winograd_conv2d: an upsampled map is padded by one row of zeros on each side",
        ),
    ],
)
def test_arguments_are_checked(arguments, message):
    x, weight, _ = tensors()
    with pytest.raises(UsageError) as caught:
        kernel(x.to("meta"), weight.to("meta"), **arguments)
    assert str(caught.value) == message


def test_shapes_are_checked():
    x, weight, _ = tensors()
    for given, message in (
        ((x[0], weight), "winograd_conv2d: the input has shape (20, 8, 8); give (batch, channels, height, width)"),
        ((x, weight[:, :7]), "winograd_conv2d: 20 channels come in, and the weight has 7"),
        ((x, weight[..., :2]), "winograd_conv2d: the weight has shape (40, 20, 3, 2); give (40, 20, 3, 3)"),
        ((x, weight[0]), "winograd_conv2d: the weight has 3 axes; give (outputs, channels, 3, 3)"),
    ):
        with pytest.raises(UsageError) as caught:
            OP(*(t.to("meta") for t in given), None, None, None, 40, 4)
        assert str(caught.value) == message
    with pytest.raises(RuntimeError, match="must be float32 on the CPU"):
        kernel(x.double(), weight.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 0, 8, 8), "weight": (40, 0, 3, 3)}, "an input of shape [2, 0, 8, 8] has no channels"),
        ({"outputs": -1}, "there cannot be -1 outputs"),
        ({"outputs": 33}, "the weight has shape [40, 20, 3, 3]; give [33, 20, 3, 3], or what hasten::winograd_weight"),
        ({"weight": (40, 7, 3, 3)}, "the weight has shape [40, 7, 3, 3]; give [40, 20, 3, 3], or what"),
        ({"weight": (40, 20, 3)}, "the weight has shape [40, 20, 3]; give [40, 20, 3, 3], or what"),
        ({"weight": (2, 1, 6, 6, 16, 32)}, "are not those of 20 channels, 40 outputs"),
        ({"bias": (39,)}, "bias has shape [39]; give [40]"),
        ({"norm": (3, 1, 20)}, "norm has shape [3, 1, 20]; give [3, 2, 20]"),
        ({"other": (2, 40, 1, 8)}, "the added operand has shape [2, 40, 1, 8]; give that of the result, [2, 40, 8, 8]"),
        ({"other": (3, 40, 1, 1)}, "the added operand has shape [3, 40, 1, 1]; give that of the result"),
        ({"tile": 3}, "no tile of 3 for a 3x3 convolution; tiles: 2, 4, 6"),
        ({"tile": 6, "phases": True}, "no tile of 6 for the phases of an upsampled map; tiles: 2, 4"),
        ({"act_in": "gelu"}, "no activation 'gelu'; give 'none' or 'silu'"),
        ({"act_out": "SiLU"}, "no activation 'SiLU'; give 'none' or 'silu'"),
        ({"padding_mode": "wrap"}, "padding_mode 'wrap' is none of zeros, reflect, replicate, circular"),
        ({"padding": (1, 1, -1, 1)}, "padding is [1, 1, -1, 1]; give [top, left, bottom, right], from 0 up"),
        (
            {"padding": (1, 8, 1, 1), "padding_mode": "reflect"},
            "is too small to be padded by [1, 8, 1, 1] with mode 'ref",
        ),
        (
            {"padding": (1, 1, 9, 1), "padding_mode": "circular"},
            "is too small to be padded by [1, 1, 9, 1] with mode 'c",
        ),
        (
            {"x": (2, 20, 0, 8), "padding_mode": "replicate"},
            "is too small to be padded by [1, 1, 1, 1] with mode 'repl",
        ),
        ({"padding": (0, 0, 0, 0), "phases": True}, "an upsampled map is padded by one row of zeros on each side"),
    ],
    ids=str,
)
def test_arguments_are_checked_by_the_kernel_itself(change, message):
    given = {"x": (2, 20, 8, 8), "weight": (40, 20, 3, 3), "bias": (40,), "norm": None, "other": None}
    given |= {"outputs": 40, "tile": 4} | change
    operands = {
        n: torch.randn(given.pop(n)) if given[n] else given.pop(n) for n in ("x", "weight", "bias", "norm", "other")
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OP(**operands, **given)


@pytest.mark.parametrize("name", ["bias", "norm", "other", "weight"])
def test_operands_of_another_type_are_refused_by_the_kernel_itself(name):
    x, weight, bias = tensors()
    made = torch.ops.hasten.winograd_weight(weight, 4)
    operands = {"weight": made, "bias": bias, "norm": torch.randn(3, 2, 20), "other": torch.randn(2, 40, 1, 1)}
    operands[name] = operands[name].half()
    with pytest.raises(RuntimeError, match="must be float32 on the CPU, not Half on cpu"):
        OP(x, *operands.values(), 40, 4)


def test_maps_may_be_padded_by_as_much_as_torch_allows():
    x, weight, bias = tensors(height=4, width=5)
    for mode, padding in (("reflect", (3, 4, 3, 4)), ("circular", (4, 5, 4, 5)), ("replicate", (9, 9, 9, 9))):
        want = wino.reference(x, weight, bias, padding=padding, padding_mode=mode)
        assert error(kernel(x, weight, bias, padding=padding, padding_mode=mode), want) < ROUNDING[4]


def test_results_of_any_size_reuse_memory():
    """Of blocks of 2 MiB, as much as of larger ones: the second result lies where the first one did."""
    _, weight, _ = tensors(channels=16, outputs=64)
    for size in (66, 72, 80, 100, 112, 140):  # 1.1 to 5 MiB
        x = torch.randn(1, 16, size, size)
        kernel(x, weight)
        first = kernel(x, weight)
        address = first.data_ptr()
        del first
        in_between = torch.empty(3 << 18)  # what malloc would give away again
        second = kernel(x, weight)
        assert second.data_ptr() == address, size
        del second, in_between


def test_no_backward_pass():
    x, weight, bias = tensors()
    y = kernel(x, weight.requires_grad_(), bias)
    assert error(y.detach(), wino.reference(x, weight, bias).detach()) < ROUNDING[4]
    with pytest.raises(UsageError) as caught:
        y.sum().backward()
    assert str(caught.value) == (
        "hasten::winograd_conv2d has no backward pass: optimised modules are for inference; train the original "
        "module, or torch.compile it with backend 'hasten', which leaves graphs that need gradients alone"
    )


def test_compiled_with_inductor():
    x, weight, bias = tensors()
    norm = torch.randn(3, 2, 20)

    def model(x, weight, bias, norm):
        return F.gelu(kernel(F.relu(x), weight, bias, norm, act_in="silu")) + 1

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(x, weight, bias, norm)
        assert torch.allclose(got, model(x, weight, bias, norm), atol=1e-5)


def test_declared_as_torch_wants_it():
    x, weight, bias = tensors()
    arguments = (x, weight, bias, torch.randn(3, 2, 20), torch.randn(2, 40, 1, 1), 40, 4)
    torch.library.opcheck(OP.default, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        torch.ops.hasten.winograd_weight.default, (weight, 4), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 3e-3), (torch.float64, 1e-13)])
def test_other_types_take_the_operators(dtype, allowed):
    x, weight, bias = (t.to(dtype) for t in tensors(height=9, width=6))
    x *= 600 if dtype == torch.float16 else 1  # tiles of the plain transforms would overflow
    weight /= 600 if dtype == torch.float16 else 1
    y = operators(x, weight, bias)
    assert y.dtype == dtype
    assert error(y, wino.reference(x, weight, bias)) < allowed
    made = wino.winograd_weight(weight, 4)
    assert error(wino.winograd_conv2d(x, made, bias, None, None, 40, 4), wino.reference(x, weight, bias)) < allowed


def test_a_result_that_no_memory_holds():
    x = torch.zeros(1).expand(1, 64, 1 << 20, 1 << 20)
    with pytest.raises(RuntimeError, match=r"hasten: there is no memory for a result of 281474976710656 bytes"):
        kernel(x, torch.zeros(64, 64, 3, 3))


LITTLE_MEMORY = """
import resource, torch
from hasten.passes.ops.native import build
import hasten.passes.ops
assert build.load() is None
torch.set_num_threads(1)
x, u = torch.zeros(1, 2048, 64, 64), torch.ops.hasten.winograd_weight(torch.zeros(1, 2048, 3, 3), 4)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (40 << 20), -1))
try:
    torch.ops.hasten.winograd_conv2d(x, u, None, None, None, 1, 4, workspace=1 << 40)
except RuntimeError as error:
    print(str(error).splitlines()[0])
print(torch.ops.hasten.winograd_conv2d(x, u, None, None, None, 1, 4, workspace=1).shape)
"""


def test_a_workspace_that_no_memory_holds():
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=True)
    said, shape = done.stdout.splitlines()
    assert re.fullmatch(
        r"hasten::winograd_conv2d: there is no memory for a workspace of \d+ bytes, "
        r"for an input of \[1, 2048, 64, 64\]; give a smaller workspace, "
        r"or keep the direct convolution \(skip winograd-conv2d\)",
        said,
    )
    assert shape == "torch.Size([1, 1, 64, 64])"


WORKSPACES = """
import resource, torch
from hasten.passes.ops.native import build
import hasten.passes.ops
from hasten.passes.ops.native.schemas import CHUNK_BYTES
assert build.load() is None
torch.set_num_threads(1)
plain = (320, 16, 16, 4, False), (640, 6, 120, 4, False), (1280, 4, 128, 2, False), (1280, 8, 190, 6, False)
for channels, height, width, tile, phases in (*plain, (320, 30, 31, 4, True), (512, 3, 128, 4, True)):
    x = torch.zeros(1).expand(1, channels, height, width)
    u = torch.ops.hasten.winograd_weight(torch.zeros(1, channels, 3, 3), tile, phases)
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 20), -1))
    try:
        torch.ops.hasten.winograd_conv2d(x, u, None, None, None, 1, tile, phases)
        raise SystemExit("there was memory after all")
    except RuntimeError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(channels, height, width, tile, int(phases), said.partition("a workspace of ")[2].split()[0])
"""


def test_the_workspace_is_at_most_what_the_choice_counts_with():
    """The kernel's own number is in what it says where there is not so much memory."""
    # else glibc may keep what was freed before, and take the workspace out of that
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", WORKSPACES], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for channels, height, width, tile, phases, taken in lines:
        layer = Layer("upsample_conv2d" if phases else "conv2d", 1, channels, 1, height, width)
        form = next(f for f in select.forms(layer.op) if f.tile == tile)
        counted = select.workspace_bytes(layer, form)
        assert taken <= counted <= 2 * taken, layer  # chunks of another processor may be larger
