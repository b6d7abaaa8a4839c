"""The Triton kernels of winograd_conv2d, run on the CPU by Triton's interpreter, and compiled for a GPU.

The interpreter is chosen when Triton is imported, so the checks run in processes of their own; each prints what it
found and the tests read it. Compiling needs no GPU, and sees what the interpreter does not: arguments of one become
constants, which have no tensor's methods.
"""

import json
import os
import subprocess
import sys

import pytest

from hasten.passes.ops.winograd_conv2d.transforms import transform

pytest.importorskip("triton")

_CHECKS = """
import json, torch
import torch.nn.functional as F
from hasten.passes.ops.winograd_conv2d import triton as kernels
from hasten.passes.ops.winograd_conv2d.weights import plain_weight

torch.manual_seed(0)
kernels.PER_THREAD = {m: 16 * n for m, n in kernels.PER_THREAD.items()}  # fewer programs, for the interpreter's sake
found = {"errors": {}, "kept": {}, "same": {}, "refused": {}}
C, K, MIB = 5, 7, 1 << 20

def expected(x, weight, bias, norm, other, phases, padding, act_in, act_out):
    x, weight, bias, norm, other = (None if t is None else t.double() for t in (x, weight, bias, norm, other))
    if norm is not None:
        origin, scale, shift = norm[..., None, None]
        x = (x - origin) * scale + shift
    x = F.silu(x) if act_in == "silu" else x
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if phases else x
    top, left, bottom, right = padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias)
    y = y if other is None else y + other
    return F.silu(y) if act_out == "silu" else y

def conv(x, weight, tile, phases=False, bias=None, norm=None, other=None, padding=(1, 1, 1, 1), act_in="none",
         act_out="none", workspace=64 * MIB):
    u = plain_weight(weight, tile, phases, normalised=x.dtype == torch.float16).to(x.dtype)
    return kernels.winograd_conv2d_triton(
        x, u, bias, norm, other, weight.shape[0], tile, phases, list(padding), act_in, act_out, workspace
    )

def check(name, x, weight, tile, phases=False, bias=None, norm=None, other=None, padding=(1, 1, 1, 1),
          act_in="none", act_out="none"):
    y = conv(x, weight, tile, phases, bias, norm, other, padding, act_in, act_out)
    e = expected(x, weight, bias, norm, other, phases, padding, act_in, act_out)
    rms = ((y.double() - e).square().mean() / e.square().mean()).sqrt().item()
    found["errors"][name] = [rms, tile, phases, x.shape[1]]
    last = y.permute(0, 2, 3, 1).is_contiguous()
    found["kept"][name] = bool(y.shape == e.shape and y.dtype == x.dtype and last and y.isfinite().all())
    return y

weight, bias = torch.randn(K, C, 3, 3), torch.randn(K)
for tile in (2, 4):
    for phases in (False, True):
        for i, size in enumerate(((1, 1), (2, 3), (5, 7), (8, 8))):
            x = torch.randn(2, C, *size)
            x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
            check(f"{tile} {phases} {size}", x, weight, tile, phases, bias=bias if i % 2 else None)
check("6", torch.randn(2, C, 5, 7), weight, 6)
check("one channel", torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3), 2)
check("blocks", torch.randn(2, 37, 17, 17), torch.randn(130, 37, 3, 3), 2, bias=torch.randn(130))
check("padding", torch.randn(2, C, 5, 7), weight, 4, padding=(0, 2, 1, 0))
check("no padding", torch.randn(2, C, 5, 7), weight, 2, padding=(0, 0, 0, 0))

x, norm = torch.randn(2, C, 5, 7) + 3, torch.randn(3, 2, C) + 2
check("norm", x, weight, 4, norm=norm)
check("norm silu", x, weight, 4, norm=norm, act_in="silu", bias=bias)
check("silu", x, weight, 2, act_in="silu")
check("norm silu phases", x, weight, 4, True, norm=norm, act_in="silu")
check("norm half", x.half(), weight, 4, norm=norm.half(), act_in="silu", bias=bias.half())

full = torch.randn(2, K, 5, 7)
check("other", x, weight, 4, other=full, act_out="silu")
check("other channels-last", x, weight, 2, other=full.contiguous(memory_format=torch.channels_last), bias=bias)
check("other a sample", x, weight, 4, other=torch.randn(2, K, 1, 1), bias=bias)
check("other a channel", x, weight, 4, other=torch.randn(1, K, 1, 1), act_out="silu")
check("other phases", x, weight, 2, True, other=torch.randn(2, K, 10, 14), bias=bias, act_out="silu")

wide, many = torch.randn(16, 33, 3, 3), torch.randn(2, 33, 12, 12).half()
for tile in (2, 4):
    for phases in (False, True):
        check(f"half {tile} {phases}", many, wide, tile, phases, bias=torch.randn(16))
        for size in (600, 2000, 60000):
            large = (torch.randint(0, 2, (1, 33, 8, 8)) * 2 - 1).half() * size
            large[:, ::2] = size
            check(f"half {size} {tile} {phases}", large, wide / 400, tile, phases)

strided = torch.randn(2, 9, 8, 16)[:, 2:7, 1:6, 1:15:2]
found["same"]["strides"] = torch.equal(conv(strided, weight, 4), conv(strided.contiguous(), weight, 4))
taken = []
empty = torch.empty
def counted(*args, **kwargs):
    made = empty(*args, **kwargs)
    if made.ndim == 3:
        taken[-1] += made.numel() * made.element_size()
    return made
torch.empty = counted
found["workspaces"] = []
for dtype, tile, phases in ((torch.float32, 2, False), (torch.float32, 2, True), (torch.float16, 4, False)):
    x = torch.randn(2, C, 6, 5).to(dtype)
    each = (tile + (1 if phases else 2)) ** 2 * (4 if phases else 1) * (C * x.element_size() + K * 4)
    results = []
    for tiles in (1000, 5, 2):
        taken.append(0)
        workspace = each * tiles + each // 2
        results.append(conv(x, weight, tile, phases, bias=bias, norm=norm, act_in="silu", workspace=workspace))
        found["workspaces"].append([taken[-1], workspace])
    found["same"][f"{dtype} {tile} {phases}"] = all(torch.equal(results[0], y) for y in results[1:])
found["empty"] = list(conv(torch.randn(0, C, 4, 4), weight, 4).shape)

def refused(name, call):
    try:
        call()
    except ValueError as error:
        found["refused"][name] = [type(error).__name__, str(error)]

x = torch.randn(2, C, 5, 7)
def direct(x, u, norm=None, tile=4, phases=False, padding=(1, 1, 1, 1), act="none", workspace=MIB):
    arguments = (x, u, None, norm, None, K, tile, phases, list(padding), act, "none", workspace)
    return lambda: kernels.winograd_conv2d_triton(*arguments)
u = plain_weight(weight, 4, False).float()
refused("bfloat16", direct(x.bfloat16(), u.bfloat16()))
refused("float64", direct(x.double(), u.double()))
refused("weights' type", direct(x.half(), u))
refused("weights' shape", direct(x, u[:-1]))
refused("norm", direct(x, u, norm=torch.randn(3, 2, 4)))
refused("padding", direct(x, torch.randn(100, C, K), phases=True, padding=(0, 1, 1, 1)))
refused("activation", direct(x, u, act="gelu"))
refused("workspace", direct(x, u, workspace=1000))
refused("tile", direct(x, u, tile=5))
print(json.dumps(found))
"""

_COMPILE = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from hasten.passes.ops.winograd_conv2d import triton as kernels

class Gpu:
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_active_torch_device(self):
        return torch.device("cpu")

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*args, **options):
            made.append(self.kernel.warmup(*args, grid=grid, **options).asm["ptx"])
        return compile

driver.set_active(Gpu())
for name in ("_transform_input", "_multiply", "_transform_output"):
    setattr(kernels, name, Compiled(getattr(kernels, name)))
kernels._precision = lambda x: "tf32x3"
found = {}
for name, dtype, size, channels, tile, phases in (
    ("ones", torch.float32, 1, 1, 2, False),
    ("large", torch.float16, 32, 64, 4, False),
    ("phases", torch.float32, 32, 64, 2, True),
):
    made, step = [], 2 if phases else 1
    x = torch.empty(1, channels, size, size, dtype=dtype)
    u = torch.empty((tile + (1 if phases else 2)) ** 2 * (4 if phases else 1), channels, channels, dtype=dtype)
    other = torch.empty(1, channels, size * step, size * step, dtype=dtype)
    kernels.winograd_conv2d_triton(
        x, u, u[0, 0], torch.empty(3, 1, channels), other, channels, tile, phases, [1] * 4, "silu", "silu", 1 << 26
    )
    found[name] = ["mma.sync" in ptx for ptx in made]
print(json.dumps(found))
"""


def run(code, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


@pytest.fixture(scope="module")
def found():
    return run(_CHECKS, TRITON_INTERPRET="1")


def test_float32_results_are_the_convolution_s(found):
    errors = {name: error for name, error in found["errors"].items() if "half" not in name}
    assert len(errors) == 30
    for name, (error, tile, phases, channels) in errors.items():
        allowed = transform(tile, 2 if phases else 3).expected_error("float32", channels)
        assert error <= 1.5 * max(allowed, 2e-7), name


def test_float16_results_are_as_far_off_as_expected_and_large_maps_do_not_overflow(found):
    errors = {name: error for name, error in found["errors"].items() if "half" in name}
    assert len(errors) == 17
    for name, (error, tile, phases, _) in errors.items():
        assert error <= 1.5 * transform(tile, 2 if phases else 3).expected_error("float16"), name


def test_the_result_has_the_input_s_type_and_is_channels_last_and_finite(found):
    assert [name for name, kept in found["kept"].items() if not kept] == []


def test_strides_and_strips_change_no_bit(found):
    assert len(found["same"]) == 4
    assert [name for name, same in found["same"].items() if not same] == []


def test_transformed_tiles_stay_within_the_workspace(found):
    assert len(found["workspaces"]) == 9
    assert [pair for pair in found["workspaces"] if not 0 < pair[0] <= pair[1]] == []


def test_an_empty_batch_gives_an_empty_result(found):
    assert found["empty"] == [0, 7, 4, 4]


def test_what_cannot_be_computed_is_refused_with_the_reason(found):
    refused = found["refused"]
    assert {kind for kind, _ in refused.values()} == {"UsageError"}
    messages = {name: message.removeprefix("winograd_conv2d: ") for name, (_, message) in refused.items()}
    assert messages == {
        "bfloat16": "x is bfloat16, and 4x4 tiles transformed to that type would put every output off by 1.1%; "
        "give float16 or float32, or take the direct convolution",
        "float64": "x is float64; the Triton kernels take float32 and float16",
        "weights' type": "the transformed weights are float32 and x is float16; "
        "give plain_weight(...).to(torch.float16)",
        "weights' shape": "the transformed weights have shape (35, 5, 7); 4x4 tiles take (36, 5, 7), from plain_weight",
        "norm": "norm has shape (3, 2, 4); give origin, scale and shift: (3, 2, 5)",
        "padding": "padding is [0, 1, 1, 1]; an upsampled map takes [1, 1, 1, 1]",
        "activation": "no activation 'gelu'; give 'none' or 'silu'",
        "workspace": "workspace is 1000 bytes, and a single tile takes 1728; give more",
        "tile": "winograd: no interpolation points for F(5, 3); give them, or take one of F(2, 3), F(4, 3), F(6, 3), "
        "F(2, 2), F(4, 2)",
    }


def test_the_kernels_compile_for_a_gpu_and_multiply_on_its_tensor_cores(tmp_path):
    found = run(_COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert found == {name: [False, True, False] for name in ("ones", "large", "phases")}
