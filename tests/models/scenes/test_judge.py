"""The classifier and the evaluation that rests on it."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hasten.errors import HastenError
from hasten.models.scenes import classifier, clips, evaluate
from hasten.models.scenes.adapters import specification
from hasten.models.scenes.data import COLOURS, NULL_CLASS, render
from hasten.models.scenes.subject import CLIPS
from hasten.passes.solvers.schedule import alpha_bar


def judged(images, labels):
    label = torch.as_tensor(labels)
    return classifier.accuracy(classifier.load(), torch.as_tensor(images), label // len(COLOURS), label % len(COLOURS))


def test_the_classifier_knows_unseen_scenes_and_is_small():
    scenes = render(512, seed=99_000_000)
    assert judged(scenes.images, scenes.labels)["both"] >= 0.99
    assert classifier.WEIGHTS.stat().st_size < 1_000_000


def test_the_classifier_tells_shape_and_colour_apart():
    scenes = render(128, seed=99_000_001)
    other_colour = scenes.labels // 4 * 4 + (scenes.labels % 4 + 1) % 4
    assert judged(scenes.images, other_colour) == {"shape": pytest.approx(1, abs=0.02), "colour": 0, "both": 0}
    other_shape = (scenes.labels + 4) % 16
    assert judged(scenes.images, other_shape)["shape"] < 0.02
    assert judged(scenes.images, other_shape)["colour"] > 0.98


def test_training_learns(tmp_path):
    path = tmp_path / "classifier.safetensors"
    right = classifier.train(60, weights=path)
    assert right > 0.3  # 1 in 16 by chance
    assert [p.name for p in tmp_path.iterdir()] == ["classifier.safetensors"]
    assert isinstance(classifier.load(path), classifier.Classifier)


def test_evaluate_gives_full_marks_to_a_network_that_knows_and_few_to_one_that_does_not():
    pictures = F.pixel_unshuffle(torch.from_numpy(render(17, 5, labels=torch.arange(17).numpy() % 16).images), 2)
    assert specification("scenes-unet")["unshuffle"] == 2
    bars = alpha_bar("squaredcos_cap_v2")

    def knowing(x, times, labels):
        bar = float(bars[int(times[0])])
        x0 = pictures[labels]
        eps = (x - bar**0.5 * x0) / (1 - bar) ** 0.5
        return bar**0.5 * eps - (1 - bar) ** 0.5 * x0

    def constant(x, times, labels):
        return knowing(x, times, torch.full_like(labels, 3))

    options = {"steps": 2, "guidance": 1.0, "count": 16}
    result = evaluate.evaluate("unet", denoise=knowing, **options)
    assert result["generated"] == {"shape": 1, "colour": 1, "both": 1}
    assert result["real"]["both"] > 0.9
    assert {k: result[k] for k in options} == options
    assert evaluate.evaluate("unet", denoise=constant, **options)["generated"] == {
        "shape": 4 / 16,
        "colour": 4 / 16,
        "both": 1 / 16,
    }
    assert NULL_CLASS == 16


def test_evaluate_measures_the_motion_of_clips():
    made = clips.render(48, 5, labels=np.arange(48))
    clean = CLIPS.latents(torch.from_numpy(made.frames), 2)
    told = CLIPS.condition(torch.arange(48))

    def network(which):
        def denoise(x, times, captions):
            label = (captions[:, None] == told[None]).all((2, 3)).int().argmax(1)
            return (x - clean[which(label)]) / (times.view(-1, 1, 1, 1, 1) / 1000)

        return denoise

    options = {"steps": 2, "guidance": 1.0, "count": 48}
    result = evaluate.evaluate("video", denoise=network(lambda label: label), **options)
    right = result["generated"]
    assert right["colour"] == right["speed"] == result["real"]["speed"] == 1
    assert min(right["all"], right["frames"], result["real"]["all"]) > 0.9
    assert [right[s] for s in clips.SPEEDS] == pytest.approx(clips.PIXELS_A_FRAME, abs=0.02)
    # As many fast clips as were asked for slow ones, and so on round; shape and colour stay.
    faster = evaluate.evaluate("video", denoise=network(lambda label: (label + 16) % 48), **options)["generated"]
    assert (faster["speed"], faster["all"], faster["colour"]) == (0, 0, 1)
    assert evaluate.table("video", result).splitlines()[:2] == [
        "scenes-video: 48 clips, 2 steps, guidance 1",
        "             shape  colour   speed     all  frames  wobble   still    slow    fast",
    ]


def test_results_are_kept_side_by_side_and_printed(tmp_path):
    path = tmp_path / "quality.json"
    marks = {"shape": 1.0, "colour": 0.5, "both": 0.5}
    result = {"generated": marks, "real": marks, "steps": 50, "guidance": 2.0, "count": 8}
    evaluate.keep("unet", result, path)
    evaluate.keep("dit", {**result, "count": 9}, path)
    assert {k: v["count"] for k, v in json.loads(path.read_text()).items()} == {"scenes-unet": 8, "scenes-dit": 9}
    assert [p.name for p in tmp_path.iterdir()] == ["quality.json"]
    assert evaluate.table("unet", result) == (
        "scenes-unet: 8 pictures, 50 steps, guidance 2\n"
        "             shape  colour    both\n"
        "generated    1.000   0.500   0.500\n"
        "real         1.000   0.500   0.500"
    )


def test_message_says_how_to_train(tmp_path):
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(HastenError) as caught:
        classifier.load(path)
    assert str(caught.value) == (
        f"the scenes classifier has no weights: {path} is missing; "
        "train it with `python -m hasten.models.scenes.classifier train`"
    )
