"""Constant acceleration flow on scenes: its networks, its pairs, its training with few steps, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.errors import HastenError, UsageError
from hasten.models.registry import get
from hasten.models.scenes import caf, train_caf
from hasten.models.scenes.generate import initial_noise
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.sample import sample

LABELS = torch.tensor([3, 9])


@pytest.fixture(scope="module")
def untrained() -> nn.Module:
    return caf.untrained()


def test_both_networks_begin_as_the_flow_they_come_from(untrained: nn.Module) -> None:
    """One evaluation of each is rectified flow at the same place: v is h times its velocity, a what is missing."""
    flow, x = get("scenes-dit").module(), initial_noise(get("scenes-dit"), 2, 0)
    time, beside = torch.tensor([0.0, 0.4]), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        backwards = flow(x, 1000 * caf.noise_level(time), LABELS)
        velocity = caf.Velocity(untrained)(x, time, LABELS)
        acceleration = caf.Acceleration(untrained)(x, time, LABELS, beside)
    torch.testing.assert_close(velocity, -1.5 * backwards)
    torch.testing.assert_close(acceleration, -2 * backwards - 2 * beside)
    assert caf.noise_level(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([1, 0.375, 0])


def test_one_step_of_the_untrained_networks_is_one_step_of_the_flow(untrained: nn.Module) -> None:
    x = initial_noise(get("scenes-dit"), 2, 0)
    flow = get("scenes-dit").module()
    with torch.no_grad():
        euler = sample(lambda y, t: flow(y, torch.full((2,), t), LABELS), flow_euler(1), x)
        made = caf.run((caf.Velocity(untrained), caf.Acceleration(untrained)), x, LABELS, steps=1)
    torch.testing.assert_close(made, euler, rtol=1e-4, atol=1e-4)


class Straight(nn.Module):
    """Knows where every noise goes, as a trained network would: ``x_0 - x_1`` is always the same picture."""

    def forward(self, both: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, return_dict: bool) -> Any:
        return (torch.full_like(both[:, :3], 0.25) + 0.01 * labels[:, None, None, None],)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_network_that_knows_goes_there_and_back(steps: int) -> None:
    networks = caf.Velocity(Straight()), caf.Acceleration(Straight())
    x = initial_noise(get("scenes-dit"), 2, 0)
    picture = caf.run(networks, x, LABELS, steps=steps)
    torch.testing.assert_close(picture, x - 0.25 - 0.01 * LABELS[:, None, None, None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caf.run(networks, picture, LABELS, steps=steps, inverse=True), x, rtol=1e-5, atol=1e-5)
    assert caf.generate(networks, LABELS, steps=steps).abs().max() <= 1


def test_pairs_are_deterministic_and_go_on(tmp_path: Any) -> None:
    calls: list[int] = []

    def denoise(x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * 0.5 + labels[:, None, None, None] * 0.01

    first = train_caf.pairs(40, tmp_path / "pairs.safetensors", denoise=denoise)
    assert {name: tuple(t.shape) for name, t in first.items()} == {
        "noise": (40, 3, 32, 32),
        "picture": (40, 3, 32, 32),
        "label": (40,),
    }
    assert first["label"][:17].tolist() == [*range(16), 0]
    assert set(calls) == {64}  # 32 with their label and 32 without
    made = len(calls)
    again = train_caf.pairs(64, tmp_path / "pairs.safetensors", denoise=denoise)
    assert len(calls) == made  # they are there already
    assert all(torch.equal(again[name][:40], first[name]) for name in first)
    other = train_caf.pairs(33, tmp_path / "other.safetensors", denoise=denoise)
    assert all(torch.equal(other[name], first[name][:33]) for name in first)
    assert torch.equal(first["noise"][:32], initial_noise(get("scenes-dit"), 32, train_caf.FIRST_SEED).half())


def test_a_few_steps_of_training_lower_both_losses(tmp_path: Any, untrained: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 32, 32, generator=generator).half()
    known = {"noise": noise, "picture": (noise * 0 + 0.5), "label": torch.arange(4)}
    before = [loss.item() for loss in train_caf.losses_at(untrained, known, 1000, 8)]
    assert before == [loss.item() for loss in train_caf.losses_at(untrained, known, 1000, 8)]
    weights = train_caf.train(
        known, 12, batch=8, rate=1e-3, model=caf.untrained(), weights=tmp_path / "caf.safetensors"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["caf.safetensors"]
    assert weights.stat().st_size < 7_000_000
    velocity, acceleration = caf.load(weights)
    assert velocity.model is acceleration.model
    after = [loss.item() for loss in train_caf.losses_at(velocity.model, known, 1000, 8)]
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))


def test_messages(tmp_path: Any, untrained: nn.Module) -> None:
    path = tmp_path / "caf.safetensors"
    with pytest.raises(HastenError) as caught:
        caf.load(path)
    assert str(caught.value) == (
        f"constant acceleration flow has no weights: {path} is missing; "
        "train it with `python -m hasten.models.scenes.train_caf`"
    )
    with pytest.raises(UsageError, match="caf: labels are a list of numbers from 0 to 15"):
        caf.generate((caf.Velocity(untrained), caf.Acceleration(untrained)), [16])
    empty = {name: torch.empty(0) for name in ("noise", "picture", "label")}
    with pytest.raises(UsageError, match="there are no pairs to learn from; give --pairs of 32 or more"):
        train_caf.train(empty, 1, weights=path)
