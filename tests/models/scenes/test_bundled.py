"""The weights that are shipped: they draw what they are asked to draw, and the numbers kept about them are theirs."""

import json

import pytest
import torch

from hasten.models.registry import get
from hasten.models.scenes import classifier, clips, evaluate, motion
from hasten.models.scenes.adapters import FOLDER
from hasten.models.scenes.data import CLASSES, COLOURS
from hasten.models.scenes.generate import generate


@pytest.mark.parametrize("name", ["scenes-unet", "scenes-dit"])
def test_every_class_is_drawn(name):
    adapter = get(name)
    assert adapter.trained
    label = torch.arange(len(CLASSES)).repeat(2)
    images = generate(adapter.module(), adapter, label, steps=20, guidance=2.0, seed=1)
    right = classifier.accuracy(classifier.load(), images, label // len(COLOURS), label % len(COLOURS))
    assert right["both"] >= 0.9
    # Pictures of one class differ: position, size and background are the noise's to choose.
    assert (images[:16] - images[16:]).abs().flatten(1).mean(1).min() > 0.02


@pytest.mark.slow
def test_clips_show_the_shape_the_colour_and_the_speed_asked_for():
    adapter = get("scenes-video")
    assert adapter.trained
    label = torch.arange(0, len(clips.CLASSES), 2)
    frames = generate(adapter.module(), adapter, label, steps=20, guidance=2.0, seed=1)
    right = motion.accuracy(classifier.load(), frames, label)
    assert min(right["shape"], right["colour"], right["speed"]) >= 0.9
    assert right["still"] < 0.3 < right["slow"] < 1.3 < right["fast"]
    again = generate(adapter.module(), adapter, label[:8], steps=20, guidance=2.0, seed=2)
    assert (frames[:8] - again).abs().flatten(1).mean(1).min() > 0.02


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_quality_kept_is_that_of_the_weights(name):
    kept = json.loads(evaluate.QUALITY.read_text())[f"scenes-{name}"]
    assert kept["training_steps"] == evaluate.training_steps(name)
    assert kept["generated"]["both"] >= 0.9
    assert kept["real"]["both"] >= 0.99
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 8_000_000


def test_the_quality_kept_of_clips_is_that_of_the_weights():
    kept = json.loads(evaluate.QUALITY.read_text())["scenes-video"]
    assert kept["training_steps"] == evaluate.training_steps("video")
    assert kept["generated"]["all"] >= 0.85
    assert kept["real"]["all"] >= 0.95
    assert kept["real"]["speed"] == 1
    assert (FOLDER / "video.safetensors").stat().st_size < 8_000_000
