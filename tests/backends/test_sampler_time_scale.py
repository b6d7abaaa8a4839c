"""What a network in a sampler's loop is told: the training's times, or these times a factor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.errors import UsageError
from hasten.models.processes import time_scale_of
from hasten.models.registry import names
from hasten.passes.solvers import catalog
from hasten.passes.solvers.sample import sample

FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
SHAPE = (2, 3, 4, 4)


class Net(torch.nn.Module):
    """It says how large the time is, so that a factor does not go unnoticed."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(sample) * timestep[:, None, None, None]


@pytest.mark.parametrize(
    ("target", "given", "factor"),
    [
        ("onnxruntime:cpu", {}, 1.0),
        ("onnxruntime:cpu", {"time_scale": 2.5}, 2.5),
        pytest.param("aoti:cpu", {"time_scale": 0.001}, 0.001, marks=pytest.mark.slow),
    ],
)
def test_times_are_multiplied(tmp_path: Any, target: str, given: dict[str, float], factor: float) -> None:
    engine = hasten.build(
        Net().eval(),
        target=target,
        out=tmp_path / "engine",
        example_kwargs={"sample": torch.zeros(SHAPE), "timestep": torch.zeros(2)},
        sampling=hasten.Sampling("unipc", steps=3, rows=5, process={"shift": 2.0}, **given),
    )
    assert engine.manifest.loop is not None
    assert engine.manifest.loop["time_scale"] == factor
    sampler, x = hasten.sampler(engine), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def network(y: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(y) * (t * factor)

    for solver in ("unipc", "heun"):
        wanted = sample(network, catalog.build(solver, {"shift": 2.0}, 2), x)
        got = sampler(latents=x, solver=solver, num_inference_steps=2).latents
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("given", [0.0, -0.001, float("inf"), float("nan")])
def test_a_factor_is_a_number_above_zero(given: float) -> None:
    with pytest.raises(UsageError, match=r"time_scale: .* given; give a number above 0"):
        hasten.Sampling(time_scale=given)


def test_models_say_how_they_are_told() -> None:
    pytest.importorskip("diffusers")
    found = {name: time_scale_of(name) for name in names()}
    assert {name for name, factor in found.items() if factor == 0.001} == {"flux-dev", "flux-dev-reduced"}
    assert {factor for name, factor in found.items() if not name.startswith("flux")} == {1.0}
    assert (time_scale_of("FluxTransformer2DModel"), time_scale_of("Net"), time_scale_of("")) == (0.001, 1.0, 1.0)


def test_a_flux_transformer_samples_as_the_pipeline_does(tmp_path: Any) -> None:
    """Its loop: sigmas and mu for the scheduler, a thousandth of the time and the guidance for the network."""
    diffusers = pytest.importorskip("diffusers")
    from hasten.models.flux import FLUX as FAMILY

    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    model.save_pretrained(tmp_path / "transformer")
    family = replace(FAMILY, sizes={"side": 4, "text": 5})
    adapter = family.from_directory(tmp_path / "transformer", name=str(tmp_path / "transformer"))
    sampling = hasten.Sampling("flow-euler:tokens=256,spacing=trailing", steps=4, guidance=3.5, process=FLUX)
    engine = hasten.build(adapter, target="onnxruntime:cpu", out=tmp_path / "engine", sampling=sampling)
    given = adapter.example_inputs(seed=1)
    x = given.pop("hidden_states")
    guidance, _ = torch.tensor([3.5]), (given.pop("guidance"), given.pop("timestep"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLUX)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=0.5)  # what 256 image tokens stand for
    wanted = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            told = (t.expand(1) / 1000).to(x.dtype)
            velocity = model(wanted, timestep=told, guidance=guidance, **given, return_dict=False)[0]
            wanted = scheduler.step(velocity, t, wanted, return_dict=False)[0]
    got = hasten.sampler(engine)(latents=x, **given).latents
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (wanted - x).abs().max() > 0.1
