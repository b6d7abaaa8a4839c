"""The vectors that this processor does not choose for itself: 256 bits, and 128 bits as NEON has them.

The compiler is called through a script that takes the wider instructions away; a process of its own loads what it made
and compares every kernel with its reference.
"""

import os
import platform
import subprocess
import sys

import pytest
import torch

from hasten.passes.ops.native import build

VARIANTS = {"256 bits": ("AVX2", "-mno-avx512f"), "128 bits": ("SSE4_2", "-march=x86-64-v2")}
COMPARE = """
import torch
import hasten.passes.ops
from hasten.passes.ops.native import build
from hasten.passes.ops import attention, group_norm_act, winograd_conv2d

assert build.load() is None, build.load()
macros = {line.split()[1] for line in build._target(build._compiler()).splitlines()}
print(next(name for name in ("AVX512F", "AVX2", "SSE4_2") if f"__{name}__" in macros))
torch.manual_seed(0)
ops = torch.ops.hasten


def compare(name, got, want, bound):
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < bound, f"{name}: {error}"


for channels, outputs, height, width in ((20, 40, 8, 8), (3, 5, 5, 7), (33, 17, 13, 30)):
    x, norm = torch.randn(2, channels, height, width), torch.randn(3, 2, channels)
    weight, bias = torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5), torch.randn(outputs)
    for tile, phases in ((2, False), (4, False), (6, False), (2, True), (4, True)):
        scale = 2 if phases else 1
        other = torch.randn(2, outputs, scale * height, scale * width)
        made = ops.winograd_weight(weight, tile, phases)
        for layout in (torch.contiguous_format, torch.channels_last):
            for more in ({}, {"act_in": "silu", "act_out": "silu"}):
                fused = (norm, other.to(memory_format=layout)) if more else (None, None)
                x = x.to(memory_format=layout)
                got = ops.winograd_conv2d(x, made, bias, *fused, outputs, tile, phases, **more)
                want = winograd_conv2d.reference(x, weight, bias, *fused, phases=phases, **more)
                compare(f"winograd {tile} {phases} {more}", got, want, {2: 6e-7, 4: 1.5e-6, 6: 6e-6}[tile])

for shape, groups in (((2, 64, 9, 11), 32), ((1, 30, 5, 7), 3), ((2, 6, 17), 1)):
    weight, bias = torch.randn(2, shape[1])
    for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2]:
        x = (torch.randn(shape) * 3 + 100).to(memory_format=layout)
        for act in ("none", "silu"):
            got = ops.apply_affine(x, ops.group_norm_affine(x, weight, bias, None, None, groups, 1e-5), act)
            want = group_norm_act.reference(x, weight, bias, None, None, groups, 1e-5, act)
            compare(f"group norm {shape} {act}", got, want, 3e-6)

for B, H, N, M, D, Dv in (
    (2, 3, 50, 77, 40, 40),
    (1, 2, 3, 5, 7, 3),
    (1, 2, 97, 129, 160, 160),
    (1, 1, 700, 200, 20, 130),
    (1, 1, 100, 70, 300, 512),
    (1, 1, 16, 1, 8, 4),
):
    q, k, v = torch.randn(B, N, H, D).transpose(1, 2), torch.randn(B, H, M, D), torch.randn(B, M, H, Dv).transpose(1, 2)
    for scale in (D**-0.5, 1.0):
        want = attention.reference(q, k, v, scale=scale)
        compare(f"attention {N} {M} {D} {Dv}", ops.flash_attention(q, k, v, scale), want, 2e-6)

q, values = torch.rand(1, 1, 16, 8), torch.randn(1, 1, 91, 4)
for found in (torch.inf, -torch.inf, torch.nan):
    for row in (0, 90):
        k = torch.randn(1, 1, 91, 8)
        k[0, 0, row] = found
        want = torch.softmax(q @ k.transpose(-1, -2), -1) @ values
        assert torch.allclose(ops.flash_attention(q, k, values, 1.0), want, rtol=1e-4, atol=1e-5, equal_nan=True)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere vectors have 128 bits anyway")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kernel(name):
    instructions, flag = VARIANTS[name]
    if instructions == "AVX2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    script = build.cache_folder() / "compilers" / f"g++{flag}"  # kept: what it made is found again by its name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec "{os.environ.get("CXX", "g++")}" "$@" {flag}\n')
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(script)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == instructions
