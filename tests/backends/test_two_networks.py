"""Engines that hold two networks and the loop that asks them in turn: LTSP, STSP, guided solvers and CAF."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from loop_net import LABELS, NEGATIVE, PROCESS, SHAPE, Net, examples, table, unit_noise
from torch import nn

import hasten
from hasten.backends.sampler import Sampler
from hasten.backends.sampling import Second
from hasten.errors import UsageError
from hasten.models import registry
from hasten.models.scenes import noisy_classifier
from hasten.passes.fx.gradient import LogProbabilityGradient
from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.classifier_guidance import classifier_guided
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.table import SolverTable

ROWS = 40


class Classifier(nn.Module):
    """(B, 4, S, S) and (B,) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.into, self.norm, self.out = nn.Conv2d(4, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(
            nn.functional.silu(self.norm(self.into(x)) * (1 + time[:, None, None, None] / 1000)).mean((2, 3))
        )
        return found


class Push(nn.Module):
    """A network with a second picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.mix(torch.cat([sample, velocity], 1)) * (1 + timestep[:, None, None, None])
        return torch.tanh(found)


def guide() -> LogProbabilityGradient:
    return LogProbabilityGradient(Classifier().eval(), examples(2)["sample"], examples(2)["timestep"])


def guided_examples() -> dict[str, torch.Tensor]:
    given = examples(2)
    return {"sample": given["sample"], "timestep": given["timestep"], "guide_labels": torch.tensor([1, 2])}


def build(folder: Any, target: str, **options: Any) -> Sampler:
    sampling = {"solver": "stsp:weight=2", "steps": 5, "rows": ROWS, "process": PROCESS, **options}
    second = sampling.pop("second", Second(guide(), guided_examples()))
    engine = hasten.build(
        Net().eval(),
        target=target,
        out=folder,
        example_kwargs=examples(2),
        sampling=hasten.Sampling(second=second, **sampling),
    )
    return hasten.sampler(engine)


@pytest.fixture(scope="module", params=["onnxruntime:cpu", "aoti:cpu"])
def guided(request: Any, tmp_path_factory: Any) -> Sampler:
    return build(tmp_path_factory.mktemp("engines") / "guided", request.param)


def eager(found: SolverTable) -> torch.Tensor:
    net, classifier = Net().eval(), Classifier().eval()

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        with torch.no_grad():
            return net(x, torch.full((2,), time), NEGATIVE)

    def gradient(x: torch.Tensor, time: float) -> torch.Tensor:
        """By autograd."""
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = classifier(x, torch.full((2,), time))
            torch.log_softmax(logits, 1)[torch.arange(2), LABELS % 5].sum().backward()
        assert x.grad is not None
        return x.grad

    networks: Any = [denoise, gradient] if found.network.any() else denoise
    made: torch.Tensor = sample(networks, found, unit_noise(1)[0])
    return made


def tables() -> dict[str, SolverTable]:
    process = Process.of(PROCESS)
    split = ("ltsp:order=1", "ltsp:order=4", "stsp:order=1", "stsp:order=4")
    found = {name: table(f"{name},weight=2", 5) for name in split}
    for name in ("ddim", "plms", "unipc"):
        found[f"guided {name}"] = classifier_guided(table(name, 5), process, 2.0)
    return {**found, "dpm++2m": table("dpm++2m", 5)}


@pytest.mark.parametrize("name", tables())
def test_pictures_are_those_of_a_loop_with_autograd(guided: Sampler, name: str) -> None:
    found = tables()[name]
    made = guided(solver=found, latents=unit_noise(1)[0], class_labels=NEGATIVE, guide_labels=LABELS % 5).latents
    expected = eager(found)
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_the_guide_is_asked_for_the_classes_it_is_told(guided: Sampler) -> None:
    told = {"latents": unit_noise(1)[0], "class_labels": NEGATIVE}
    one = guided(guide_labels=torch.tensor([0, 1]), **told).latents
    other = guided(guide_labels=torch.tensor([0, 2]), **told).latents
    torch.testing.assert_close(one[0], other[0])
    assert not torch.allclose(one[1], other[1], atol=1e-3)


def test_a_row_of_the_guide_leaves_the_preview_alone(guided: Sampler) -> None:
    seen: list[Any] = []
    told = {"latents": unit_noise(1)[0], "class_labels": NEGATIVE, "guide_labels": LABELS % 5}
    guided(solver="ltsp:weight=2", chunk=1, callback=seen.append, **told)
    assert torch.equal(seen[1].preview, seen[0].latents)  # the guide alone: what it was given
    assert not torch.allclose(seen[0].preview, seen[0].latents, atol=1e-2)
    guided(solver="ltsp:weight=2", chunk=2, callback=seen.append, **told)
    assert torch.equal(seen[-5].preview, seen[0].preview)  # the denoiser, then the guide


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "aoti:cpu"])
def test_caf_gives_the_second_network_a_second_picture(tmp_path: Any, target: str) -> None:
    given = examples(2)
    second = Second(
        Push().eval(), {"sample": given["sample"], "timestep": given["timestep"], "velocity": given["sample"] / 2}
    )
    sampler = build(tmp_path / "caf", target, solver="caf", steps=3, second=second)
    net, push = Net().eval(), Push().eval()
    for inverse in (False, True):
        for steps in (1, 3):
            found = caf(steps, inverse=inverse)
            with torch.no_grad():
                expected = sample(
                    [
                        lambda x, t: net(x, torch.full((2,), t), LABELS),
                        lambda x, t, v: push(x, torch.full((2,), t), v),
                    ],
                    found,
                    unit_noise(1)[0],
                )
            made = sampler(solver=found, latents=unit_noise(1)[0], class_labels=LABELS).latents
            torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)


def test_what_does_not_fit_says_so(guided: Sampler, tmp_path: Any) -> None:
    told = {"class_labels": NEGATIVE, "guide_labels": LABELS % 5}
    with pytest.raises(UsageError, match="'guide_labels' is missing; the sampler takes class_labels, guide_labels"):
        guided(class_labels=NEGATIVE)
    with pytest.raises(UsageError, match="gives the second network a second input, and the loop's has none"):
        guided(solver=caf(3), **told)
    small = torch.zeros(2, 4, 4, 4)
    other_size = Second(Push(), {"sample": small, "timestep": torch.zeros(2), "velocity": small})
    for options, message in (
        ({"second": None}, "stsp asks two networks, and one was given; give the other as Sampling's second"),
        ({"guidance": 2.0}, "batched guidance would guide the second network's answer as well"),
        ({"second": other_size}, "both networks have an input 'sample': float32 .* one type and size, or two names"),
    ):
        with pytest.raises(UsageError, match=message):
            build(tmp_path / "engine", "onnxruntime:cpu", **options)
    with pytest.raises(UsageError, match="a step cache keeps what one network found, and this solver asks two"):
        hasten.build(
            Net().eval(),
            target="onnxruntime:cpu",
            out=tmp_path / "engine",
            example_kwargs=examples(2),
            cache="easycache:threshold=0.1",
            sampling=hasten.Sampling("stsp", process=PROCESS, second=Second(guide(), guided_examples())),
        )


def test_one_network_is_not_asked_for_a_second(tmp_path: Any) -> None:
    sampler = build(tmp_path / "engine", "onnxruntime:cpu", solver="ddim", second=None)
    with pytest.raises(UsageError, match="the solver calls a second network, and the loop has one"):
        sampler(solver="stsp", class_labels=LABELS)
    assert sampler.latents_shape == SHAPE


def test_a_tensorrt_rtx_plan_holds_both_networks(tmp_path: Any) -> None:
    """Built without a GPU and never run: each network is behind a jump of the row's choice, its weights once."""
    pytest.importorskip("tensorrt_rtx")
    sampler = build(tmp_path / "engine", "tensorrt-rtx:sm89")
    audit = sampler.engine.manifest.audit
    assert audit is not None
    assert (sampler.loop["networks"], sampler.loop["conditions"]) == (2, ["class_labels", "guide_labels"])
    assert audit["layers"]["TRIP_LIMIT"] > 0
    assert audit["layers"]["CONDITION"] == 1
    if not audit["readable"]:
        pytest.skip(audit["reason"])
    assert audit["counts"]["cjmp"] > 1
    assert audit["behind_jumps"]["corrltn"] >= 2
    assert audit["stream_capturable"] is False


@pytest.mark.slow
def test_a_tensorrt_rtx_plan_holds_scenes_unet_and_its_noisy_classifier(tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    unet = dataclasses.replace(registry.get("scenes-unet"), batch=4)
    sampling = hasten.Sampling(
        "stsp:weight=8,spacing=leading,offset=1", steps=10, second=Second(*noisy_classifier.guide(4))
    )
    engine = hasten.build(unet, target="tensorrt-rtx:sm89", out=tmp_path / "engine", sampling=sampling)
    audit = engine.manifest.audit
    assert audit is not None
    assert audit["layers"]["CONDITION"] == 1
    if not audit["readable"]:
        pytest.skip(audit["reason"])
    assert audit["behind_jumps"]["SiluGnor"] == audit["counts"]["SiluGnor"] == 17
    assert audit["bytes"]["rest"] < 1.05 * audit["weight_bytes"]
