"""``--cache`` on the command line: inspect, build, generate and bench, and what they refuse."""

from __future__ import annotations

import json

import pytest

POLICY = "first-block:threshold=0.2"


def test_inspect_shows_the_region(hasten):
    notes = [n for n in hasten("inspect", "scenes-dit", "--cache", POLICY, "--json").json["notes"] if "cache" in n]
    assert notes[0].startswith("step cache first-block: blocks 1 to 5 of 6: 8")
    assert any("decision looks at probe" in n for n in notes)
    assert notes[-1] == "step cache first-block: state of first-block: 0.164 MB"


def test_generate_reports_what_was_skipped(hasten, tmp_path):
    words = ["--cache", POLICY, "--steps", "8", "--count", "1", "--repeat", "2", "--target", "onnxruntime:cpu"]
    done = hasten("generate", "scenes-dit", "-o", tmp_path, *words, "--json")
    assert done.code == 0
    cache = done.json["cache"]
    assert len(cache["mask"]) == 8
    assert cache["mask"][0] == "1"
    assert cache["computed_steps"] + cache["skipped_steps"] == 8
    assert done.json["skipped_steps"] == cache["skipped_steps"] > 0
    assert cache["state_bytes"] > 0
    assert json.loads((tmp_path / "scenes-dit.json").read_text())["cache"] == cache


QUICK = ("--count", 1, "--repeat", 1, "--guidance", 1, "--target", "onnxruntime:cpu")


@pytest.mark.parametrize("solver", [(), ("--solver", "dpm++2m")])
def test_generate_tells_a_schedule_before_the_run(hasten, tmp_path, solver):
    done = hasten("generate", "scenes-dit", "-o", tmp_path, "--cache", "mask:10101", "--steps", 5, *QUICK, *solver)
    assert done.code == 0, done.err
    line = done.out.splitlines()[0]
    assert line.startswith("step cache mask: predicted mask 10101, 3 of 5 steps computed, 1.")
    assert line.endswith("x as fast by the operations left out; state 0.041 MB")
    assert "3 of 5 steps computed, 2 reused: 10101" in " ".join(done.out.split())  # lines are folded


def test_generate_tells_what_a_calibration_predicted(hasten, tmp_path):
    path = tmp_path / "cache.json"
    fit = {"predicted": {"mask": "110110", "computed": 4, "speedup": 1.4}}
    content = {"policy": "first-block", "options": {"threshold": 1e9}, "steps": 6, "model": "scenes-dit", "fit": fit}
    path.write_text(json.dumps(content))
    for steps, told in (
        (6, "predicted mask 110110, 4 of 6 steps computed, 1."),
        (4, "the mask is not known before the"),
    ):
        done = hasten("generate", "scenes-dit", "-o", tmp_path / "out", "--cache", path, "--steps", steps, *QUICK)
        assert done.code == 0, done.err
        assert done.out.startswith(f"step cache first-block: {told}")
        assert done.err.count("threshold 1e+09 is never reached") == 1


def test_generate_with_a_solver_tells_of_a_threshold_that_does_nothing(hasten, tmp_path):
    words = ("--cache", "first-block:threshold=1e9", "--steps", 4, "--solver", "unipc", *QUICK)
    done = hasten("generate", "scenes-dit", "-o", tmp_path, *words)
    assert done.code == 0, done.err
    assert done.out.startswith("step cache first-block: the mask is not known before the run; state 0.0819 MB")
    assert done.err.count("threshold 1e+09 is never reached: all 3 calls that first-block may decide on reuse") == 1


def test_bench_measures_speed_against_quality(hasten, tmp_path):
    words = ["--cache", POLICY, "--cache", "mask:10101010", "--thresholds", "0.2,10", "--steps", "8", "--count", "1"]
    done = hasten("bench", "scenes-dit", *words, "--rounds", "1", "--cache-target", "onnxruntime:cpu", "--json")
    assert done.code == 0
    rows = {(r["policy"], r["threshold"]): r for r in done.json["settings"]}
    assert set(rows) == {(POLICY, 0.2), (POLICY, 10.0), ("mask:10101010", None)}
    assert rows[POLICY, 10.0]["mask"] == "10000000"
    assert rows["mask:10101010", None]["computed"] == 4
    assert rows[POLICY, 0.2]["psnr_db"] > rows[POLICY, 10.0]["psnr_db"]
    assert rows[POLICY, 0.2]["ssim"] > rows[POLICY, 10.0]["ssim"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "scenes-dit", "--cache", "first-blok:threshold=1"], "no step-cache policy named 'first-blok'"),
        (["inspect", "scenes-dit", "--cache-form", "straight"], "--cache-form is for hasten build"),
        (["inspect", "scenes-dit", "--cache", POLICY, "--region", "7:9"], "region '7:9' holds no block"),
        (["bench", "sd15-unet", "--cache", POLICY], "--cache measures quality on trained models, and 'sd15-unet' is"),
        (["bench", "--cache", POLICY], "--cache: name a bundled model, such as scenes-dit"),
        (["bench", "scenes-dit", "--cache", POLICY, "--thresholds", "a"], "'a' is not a list of numbers"),
    ],
)
def test_wrong_usage(hasten, words, message):
    done = hasten(*words)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize("words", [["generate", "scenes-dit", "-o", "made"], ["bench", "scenes-dit"]])
def test_a_calibration_of_other_steps_is_refused_before_an_engine_is_built(hasten, tmp_path, words):
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({"policy": "mask", "options": {"bits": "1010"}, "steps": 4, "model": "scenes-dit"}))
    done = hasten(*words, "--cache", path, "--steps", "8")
    assert done.code == 2
    assert "mask.json is for 4 steps, and the run has 8; run as many, or calibrate this one" in done.err
    assert "building" not in done.err


def test_a_graph_without_a_region(hasten):
    done = hasten("inspect", "scenes-unet", "--cache", POLICY)
    assert done.code == 1
    assert "first-block finds nothing to skip in this graph: no residual stream" in done.err
