"""What a policy is said to keep before a run is what the run keeps, byte for byte."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from test_cached_onnx import examples, transformer

from hasten.backends.calibrate_trial import Cached
from hasten.backends.capture import capture
from hasten.backends.program import flatten
from hasten.backends.region import find_cut
from hasten.passes.fx.flow import FxFlow
from hasten.passes.fx.view import FxView
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.region import find

ONE = 4 * 4 * 6 * 6 * 4
"""Bytes of one latent, float32."""


@cache
def flat() -> Any:
    program = capture(transformer(), examples(), {})
    return flatten(program.module(check_guards=False), program)


@pytest.mark.parametrize(
    "text",
    [
        "teacache:threshold=0.2,coefficients=1/0",
        "teacache:threshold=0.2,coefficients=1/0,signal=time-embedding",
        "first-block:threshold=0.2",
        "dbcache:head=1,foot=1,warmup=2,payload=taylor,order=2",
        "easycache:threshold=0.2",
        "adacache:moreg=true,frames=4",
        "mask:1111",
        "mask:bits=1111,payload=taylor,order=3",
        "fora:interval=2",
        "spectrum:history=4",
        "magcache:model=flux",
        "smoothcache:schedule=1111",
        "meancache",
    ],
)
def test_what_is_predicted_is_held(text: str) -> None:
    policy = parse(text)
    region = find(FxFlow(FxView(flat().module)), policy)
    cached = Cached(flat(), find_cut(flat().module, policy).cut, text)
    run = cached.start(4, "1111")
    for step in range(4):
        run(x=examples()[0] * (1 - 0.1 * step), t=examples()[1] * step)
    held = sum(value.nbytes for value in run.state().values())
    assert held == cached.state_bytes > 0
    assert region.state_bytes(policy) == held


@pytest.mark.parametrize("level", [1, 2])
def test_what_is_kept_under_a_skip_connection(level: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "block_out_channels": (32, 32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    kinds = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    net = diffusers.UNet2DModel(**sizes, **kinds).eval()
    given = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(500)}
    program = capture(net, (), given)
    graph = flatten(program.module(check_guards=False), program)
    policy = parse(f"deepcache:interval=2,level={level}")
    region = find(FxFlow(FxView(graph.module)), policy)
    cached = Cached(graph, find_cut(graph.module, policy).cut, f"deepcache:interval=2,level={level}")
    run = cached.start(4, "1010")
    for step in range(4):
        run(sample=given["sample"] * (1 - 0.1 * step), timestep=given["timestep"] - step)
    assert sum(value.nbytes for value in run.state().values()) == cached.state_bytes > 0
    assert region.state_bytes(policy) == cached.state_bytes


def test_one_change_is_kept_of_a_whole_model() -> None:
    cached = Cached(flat(), find_cut(flat().module, parse("mask:bits=11,granularity=output")).cut, "mask:11")
    assert cached.state_bytes == ONE
    run = cached.start(2, "11")
    run(x=examples()[0], t=examples()[1])
    (kept,) = run.state().values()
    with torch.no_grad():
        torch.testing.assert_close(kept, transformer()(*examples()) - examples()[0], rtol=1e-5, atol=1e-5)
