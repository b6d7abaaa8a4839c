"""A loaded AOTInductor engine holds its weights once."""

import re
import sys
from pathlib import Path

import pytest
import torch

import hasten
from hasten.backends.package_pages import release_package_pages

WIDTH = 1536
WEIGHT = 4 * WIDTH * WIDTH


def resident() -> int:
    """Bytes of packages' read-only mappings that are in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = " r--p " in line and "aotinductor" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel takes pages back when asked on Linux only")
def test_weights_are_in_memory_once(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Linear(WIDTH, WIDTH)
    x = torch.randn(2, WIDTH)
    hasten.build(module, out=tmp_path / "engine", target="aoti:cpu", example_inputs=(x,))
    before = resident()
    engine = hasten.load(tmp_path / "engine")
    assert resident() - before < WEIGHT / 4
    (output,) = engine(**{engine.inputs[0].name: x}).values()
    assert torch.allclose(output, module(x), atol=1e-5)


def test_only_large_mappings_of_packages_are_asked_for(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0000000000-7f0001000000 r--p 00000000 08:01 11 /usr/lib/libother.so\n"
        "7f0002000000-7f0002001000 r--p 00000000 08:01 12 /run/aotinductor_a/model.wrapper.so\n"
        "7f0003000000-7f0004000000 rw-p 00000000 08:01 13 /run/aotinductor_a/model.wrapper.so\n"
    )
    assert release_package_pages(maps) == 0
