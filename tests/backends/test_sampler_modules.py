"""Caches of modules one by one inside a sampler's loop: what stands between the modules is in both branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_net import PROCESS, table
from torch import nn

import hasten
from hasten.backends.engine import Engine
from hasten.backends.sampler import Sampler
from hasten.errors import UsageError
from hasten.passes.solvers.sample import sample

STEPS, SHAPE = 8, (2, 8, 4, 4)
CACHE = "fora:interval=3"
MASK = "10010101"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.gates = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        first, second = self.gates(told)[:, None].chunk(2, -1)
        q, k, v = (p.unflatten(-1, (2, 16)).transpose(1, 2) for p in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + first * self.out(attended)
        return x + second * self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """(B, 8, 4, 4), times and classes (B,) -> (B, 8, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.back = nn.Linear(8, 32), nn.Linear(32, 8)
        self.classes, self.time = nn.Embedding(10, 32), nn.Linear(2, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        told = self.classes(class_labels) + self.time(torch.stack([timestep / 1000, torch.sin(timestep / 100)], 1))
        x = self.into(sample.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, told)
        return self.back(x).transpose(1, 2).unflatten(2, (4, 4))


def examples(batch: int) -> dict[str, torch.Tensor]:
    drawn = torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    return {"sample": drawn, "timestep": torch.linspace(100, 900, batch), "class_labels": torch.arange(batch)}


def looped(folder: Any, target: str, form: str, **options: Any) -> Sampler:
    engine = hasten.build(
        Transformer().eval(),
        target=target,
        out=folder,
        example_kwargs=examples(4 if form == "batched" else 2),
        cache=CACHE,
        sampling=hasten.Sampling(steps=STEPS, guidance=3.0, form=form, rows=12, process=PROCESS, **options),
    )
    return hasten.sampler(engine)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: Any) -> Engine:
    """Programs without a branch, of which a Python loop picks one a call."""
    out = tmp_path_factory.mktemp("engines") / "step"
    return hasten.build(
        Transformer().eval(), target="onnxruntime:cpu", out=out, example_kwargs=examples(4), cache=CACHE
    )


@pytest.fixture(
    scope="module",
    params=[
        ("onnxruntime:cpu", "batched"),
        pytest.param(("onnxruntime:cpu", "sequential"), marks=pytest.mark.slow),
        pytest.param(("aoti:cpu", "batched"), marks=pytest.mark.slow),
    ],
)
def loop(request: Any, tmp_path_factory: Any) -> Sampler:
    return looped(tmp_path_factory.mktemp("engines") / "loop", *request.param)


TOLD, UNTOLD = torch.tensor([3, 5]), torch.tensor([9, 9])


def in_python(engine: Engine, mask: str | None) -> tuple[torch.Tensor, str]:
    run = engine.start(STEPS, mask=mask)

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        given = {"sample": torch.cat([x, x]), "timestep": torch.full((4,), time)}
        told, untold = next(iter(run(class_labels=torch.cat([TOLD, UNTOLD]), **given).values())).chunk(2)
        return untold + 3.0 * (told - untold)

    return sample(denoise, table("dpm++2m", STEPS), start()), run.mask


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("mask", [None, MASK, "1" * STEPS, "1" + "0" * (STEPS - 1)])
def test_pictures_are_those_of_a_python_loop(loop: Sampler, one_step: Engine, mask: str | None) -> None:
    expected, decisions = in_python(one_step, mask)
    given = {"class_labels": TOLD, "negative_class_labels": UNTOLD, "latents": start()}
    made = loop(solver="dpm++2m", num_inference_steps=STEPS, mask=mask, **given)
    assert made.decisions == decisions
    torch.testing.assert_close(made.latents, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_a_reused_row_is_another_picture(loop: Sampler) -> None:
    given = {"class_labels": TOLD, "negative_class_labels": UNTOLD, "latents": start()}
    every = loop(solver="dpm++2m", num_inference_steps=STEPS, mask="1" * STEPS, **given)
    some = loop(solver="dpm++2m", num_inference_steps=STEPS, mask=MASK, **given)
    assert not torch.allclose(some.latents, every.latents, atol=1e-4)
    again = loop(solver="dpm++2m", num_inference_steps=STEPS, mask=MASK, chunk=3, **given)
    assert torch.equal(again.latents, some.latents)


def test_a_mask_that_is_too_short(loop: Sampler) -> None:
    given = {"class_labels": TOLD, "negative_class_labels": UNTOLD}
    with pytest.raises(UsageError, match="mask: 3 decisions for a run of 8 steps"):
        loop(num_inference_steps=STEPS, mask="101", **given)
