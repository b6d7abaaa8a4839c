"""The classifier of noisy scenes: what it knows at which noise level, and that its gradient guides."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hasten.errors import HastenError
from hasten.models.processes import process_of
from hasten.models.registry import get
from hasten.models.scenes import noisy_classifier
from hasten.models.scenes.adapters import specification
from hasten.models.scenes.data import render
from hasten.models.scenes.evaluate import marks
from hasten.models.scenes.generate import generate
from hasten.models.scenes.subject import subject
from hasten.passes.solvers import catalog
from hasten.passes.solvers.schedule import alpha_bar


def test_noise_is_that_of_the_model_it_guides() -> None:
    latents, time, labels = noisy_classifier.noisy(8, 5, torch.arange(0, 800, 100))
    drawn = subject(specification("scenes-unet"))
    pixels, wanted = render(8, 5)
    clean = drawn.latents(torch.from_numpy(pixels), 2)
    assert labels.tolist() == wanted.tolist()
    bars = torch.from_numpy(alpha_bar("squaredcos_cap_v2"))
    bar = bars[time.long()].float().view(-1, 1, 1, 1)
    eps = (latents - bar.sqrt() * clean) / (1 - bar).sqrt()
    assert abs(eps[1:].mean()) < 0.05
    assert abs(eps[1:].std() - 1) < 0.05


def test_the_accuracy_kept_is_that_of_the_weights() -> None:
    kept = json.loads(noisy_classifier.ACCURACY.read_text())
    found = noisy_classifier.accuracy(noisy_classifier.load(), 256)
    assert list(found) == list(kept["by_time"])
    for level, row in found.items():
        assert row["noise"] == pytest.approx(kept["by_time"][level]["noise"])
        assert row["accuracy"] == pytest.approx(kept["by_time"][level]["accuracy"], abs=0.1)  # of 256 and of 1024
    assert found["200"]["accuracy"] > 0.95
    assert 0.3 < found["800"]["accuracy"] < 0.8
    assert found["999"]["accuracy"] < 0.15  # nothing is left to be seen
    assert noisy_classifier.WEIGHTS.stat().st_size < 1_000_000


def test_training_learns(tmp_path: Any) -> None:
    path = tmp_path / "noisy.safetensors"
    result = noisy_classifier.train(60, batch=32, weights=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["noisy.json", "noisy.safetensors"]
    assert json.loads((tmp_path / "noisy.json").read_text()) == result
    assert result["by_time"]["0"]["accuracy"] > 0.15  # 1 in 16 by chance
    assert isinstance(noisy_classifier.load(path), noisy_classifier.NoisyClassifier)
    again = noisy_classifier.train(60, batch=32, weights=tmp_path / "again.safetensors")
    assert again["by_time"] == result["by_time"]


def test_its_gradient_is_a_forward_network() -> None:
    guide, examples = noisy_classifier.guide(2)
    x = examples["sample"].clone().requires_grad_(True)
    logits = noisy_classifier.load()(x, examples["timestep"])
    torch.log_softmax(logits, 1)[torch.arange(2), examples["guide_labels"]].sum().backward()
    with torch.no_grad():
        found = guide(**examples)
    assert not found.requires_grad
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-5 * float(x.grad.abs().max()))


def test_a_model_that_is_told_no_class_reaches_the_one_that_is_asked_for() -> None:
    adapter, label = get("scenes-unet"), torch.arange(16)
    denoise, (guide, _) = adapter.module(), noisy_classifier.guide(16)
    right = []
    for weight in (0.0, 8.0):
        text = f"stsp4:weight={weight},spacing=leading,offset=1"
        table = catalog.build(text, process_of("scenes-unet") or {}, 8)
        right.append(marks(generate(denoise, adapter, label, table=table, guide=guide, seed=1), label)["both"])
    assert right[0] < 0.3  # 1 in 16 by chance
    assert right[1] > 0.6


def test_message_says_how_to_train(tmp_path: Any) -> None:
    path = tmp_path / "noisy.safetensors"
    with pytest.raises(HastenError) as caught:
        noisy_classifier.load(path)
    assert str(caught.value) == (
        f"the classifier of noisy scenes has no weights: {path} is missing; "
        "train it with `python -m hasten.models.scenes.noisy_classifier train`"
    )
