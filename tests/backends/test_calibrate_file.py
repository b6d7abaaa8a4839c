"""Calibration files: written whole, read back, put together, refused where they do not belong."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hasten.backends.calibrate_file import Calibration, check_fits, merge, read
from hasten.errors import HastenError, UsageError
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.fitting import Moves, Sample

STEPS = 5


def sample(seed: int) -> Sample:
    moves = np.full((2, STEPS), 0.1 * (seed + 1))
    moves[0, :1] = moves[1, :2] = np.nan
    return Sample(seed, f"class {seed}", {"signal": Moves(np.full(STEPS, 1.5), moves)}, np.ones(STEPS), {})


def calibration(**changes: object) -> Calibration:
    made = Calibration(
        model="scenes-dit",
        request="first-block",
        region="blocks 1 to 5 of 6",
        steps=STEPS,
        shape=(2, 3, 32, 32),
        dtype="float32",
        guidance=2.0,
        distance=2,
        weights="its own",
        how="its own loop",
        share=0.8,
        state_bytes=164_000,
        versions={"torch": "2"},
        samples=(sample(0), sample(1)),
    )
    return replace(made, **changes)


FITTED = {"policy": "first-block", "options": {"threshold": 0.1}, "fit": {"predicted": {"mask": "10101"}}}


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "c.json"
    made = calibration(**FITTED, tried={"10101": 0.25, "10001": math.inf}, tried_on=(0, 1))
    made.write(path)
    back = read(path)
    assert replace(back, samples=()) == replace(made, samples=())
    np.testing.assert_array_equal(back.samples[1].values["signal"].moves, made.samples[1].values["signal"].moves)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_a_cache_reads_what_was_fitted_and_nothing_that_was_not(tmp_path):
    path = tmp_path / "c.json"
    calibration(**FITTED).write(path)
    assert parse(str(path)).decision.threshold == 0.1
    calibration().write(path)
    with pytest.raises(UsageError, match='has no "policy"'):
        parse(str(path))


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(HastenError, match=r"cannot write .*No such file"):
        calibration().write(tmp_path / "nowhere" / "c.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "damaged or cut short, it is not JSON"),
        ('{"format": 1, "samples": [{"seed"', "damaged or cut short, it is not JSON"),
        ("[]", "holds a list, not an object"),
        ('{"policy": "teacache"}', "holds no recording that this version reads .format None, expected 1."),
        ('{"format": 7, "samples": []}', "format 7, expected 1"),
        ('{"format": 1, "samples": []}', "is incomplete"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, text, said):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read(path)


def test_a_truncated_file_and_a_damaged_sample(tmp_path):
    path = tmp_path / "c.json"
    calibration().write(path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="damaged or cut short"):
        read(path)
    content = json.loads(whole)
    content["samples"][1]["ratios"] = [1.0]
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="1 entries of ratios, and its run 5 steps; record again"):
        read(path)
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "other.json")


def test_shards_become_one_recording():
    first = calibration(samples=(sample(4), sample(1)), **FITTED)
    second = calibration(samples=(sample(2), sample(4)))
    merged = merge([first, second], ["a", "b"])
    assert [s.seed for s in merged.samples] == [1, 2, 4]
    assert merged.policy is None
    assert merged.fit == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 6}, "steps 5 and 6"),
        ({"model": "scenes-unet"}, "model 'scenes-dit' and 'scenes-unet'"),
        ({"guidance": 1.0}, "guidance 2.0 and 1.0"),
        ({"shape": (2, 3, 16, 16)}, "shape 2x3x32x32 and 2x3x16x16"),
        ({"request": "easycache"}, "kind 'first-block' and 'easycache'"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_recordings_with_other_settings_are_not_merged(change, said):
    with pytest.raises(UsageError, match=f"cannot merge a and b: {said}"):
        merge([calibration(), calibration(**change)], ["a", "b"])


def test_another_threshold_in_the_request_is_the_same_recording():
    assert calibration().difference(calibration(request="first-block:threshold=0.3")) is None


def test_masks_tried_on_the_same_runs_are_known_to_both():
    one = calibration(tried={"11111": 0.0}, tried_on=(0,))
    two = calibration(tried={"10101": 0.5}, tried_on=(0,))
    assert merge([one, two], ["a", "b"]).tried == {"11111": 0.0, "10101": 0.5}
    assert merge([one, replace(two, tried_on=(1,))], ["a", "b"]).tried == {}


FILE = {"model": "scenes-dit", "policy": "mask", "options": {"bits": "10101"}, "steps": 5, "shape": [2, 3, 32, 32]}


def test_a_calibration_fits_what_it_was_made_on():
    check_fits(FILE, "scenes-dit", 5, (8, 3, 32, 32))
    check_fits(FILE)
    check_fits({"policy": "mask", "options": {}}, "flux-dev", 7, (1, 2))


@pytest.mark.parametrize(
    ("model", "steps", "shape", "said"),
    [
        ("flux-dev", 5, None, "is of the model 'scenes-dit', and this is 'flux-dev'"),
        ("scenes-dit", 20, None, "is for 5 steps, and the run has 20"),
        (None, None, (2, 3, 64, 64), "is for inputs of 2x3x32x32, and these are 2x3x64x64"),
    ],
)
def test_a_calibration_is_refused_elsewhere(tmp_path, model, steps, shape, said):
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(FILE))
    with pytest.raises(UsageError, match=said) as caught:
        check_fits(path, model, steps, shape)
    assert str(path) in str(caught.value)


def test_decisions_made_anew_in_each_run_go_with_any_number_of_steps():
    check_fits({**FILE, "policy": "teacache"}, "scenes-dit", 20)
    check_fits({**FILE, "options": {"bits": "10101", "stretch": "nearest"}}, "scenes-dit", 20)
