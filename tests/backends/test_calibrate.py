"""Calibration of a bundled model, few steps of it: recorded, fitted, searched, tried."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hasten.backends.calibrate import check, find_mask, finished, record, resume, subject
from hasten.backends.calibrate_file import read
from hasten.backends.calibrate_fit import Wishes, check_wishes, fit, requested
from hasten.backends.calibrate_runs import Draw, decibels, runs_of
from hasten.backends.calibrate_search import Bounds
from hasten.errors import UsageError
from hasten.models.registry import get
from hasten.models.scenes.adapters import FOLDER
from hasten.passes.steps.catalog import parse

pytestmark = pytest.mark.skipif(not (FOLDER / "dit.safetensors").is_file(), reason="the weights are not trained yet")
STEPS = 8


def quiet(stage: str, part: float) -> None:
    assert stage
    assert 0 <= part <= 1


@pytest.fixture(scope="module")
def dit():
    """Captured once; what differs between the policies of one region is the request."""
    return subject(get("scenes-dit"), "mask", steps=STEPS, distance=STEPS - 1, weights="its own")


@pytest.fixture(scope="module")
def recorded(dit, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrations") / "mask.json"
    return record(dit, dit.blank, dit.runs.draws(2, 0, None), path, quiet), path


def test_the_calibration_says_what_it_is_of(dit):
    blank = dit.blank
    assert (blank.model, blank.steps, blank.shape, blank.dtype) == ("scenes-dit", STEPS, (2, 3, 32, 32), "float32")
    assert (blank.guidance, blank.distance) == (2.0, STEPS - 1)
    assert "blocks 0 to 5 of 6" in blank.region
    assert 0.9 < blank.share < 1
    assert blank.state_bytes == 2 * 64 * 160 * 4  # one residual
    assert set(blank.versions) >= {"hasten", "torch", "numpy"}


def test_every_run_is_in_the_file(recorded):
    calibration, path = recorded
    assert [s.seed for s in calibration.samples] == [0, 1]
    again = read(path)
    assert [s.seed for s in again.samples] == [0, 1]
    for name in ("input", "output", "residual", "value"):
        assert again.samples[0].values[name].moves.shape == (STEPS - 1, STEPS)
    assert again.samples[0].label != again.samples[1].label
    assert np.isfinite(again.samples[0].ratios).all()


def test_a_recording_goes_on_where_it_stopped(dit, recorded, tmp_path, monkeypatch):
    whole, _ = recorded
    path = tmp_path / "part.json"
    replace(dit.blank, samples=whole.samples[:1]).write(path)
    begun = resume(dit.blank, path)
    made = []
    monkeypatch.setattr(
        dit.runs, "run", lambda denoise, draw, run=dit.runs.run: made.append(draw) or run(denoise, draw)
    )
    done = record(dit, begun, dit.runs.draws(2, 0, None), path, quiet)
    assert [draw.seed for draw in made] == [1]
    for name, moves in whole.samples[1].values.items():
        np.testing.assert_array_equal(done.samples[1].values[name].moves, moves.moves)


def test_another_recording_in_the_file_is_not_gone_on_with(dit, tmp_path):
    path = tmp_path / "other.json"
    replace(dit.blank, steps=9).write(path)
    with pytest.raises(UsageError, match="holds another recording: steps 8 and 9; give another file with -o"):
        resume(dit.blank, path)
    assert resume(dit.blank, tmp_path / "none.json") is dit.blank


def test_a_forced_mask_does_what_a_loop_by_hand_does(dit):
    """The residual of the whole stack, reused by hand from the captured graph's own values."""
    mask, draw = "11101010", Draw(5, "big red circle, flat background")
    draw = replace(draw, label=dit.runs.classes[3])
    module, cut = dit.flat.module, dit.found.cut
    tail = torch.fx.Interpreter(module)
    kept, call = None, 0

    def denoise(*tensors):
        nonlocal kept, call
        values = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, node):
                result = super().run_node(node)
                if node is cut.after[0]:
                    result = values["before"] + kept if mask[call] == "0" else result
                    values["after"] = result
                if node is cut.before[0]:
                    values["before"] = result
                return result

        output = Watch(module).run(*tensors)[0]
        kept = values["after"] - values["before"] if mask[call] == "1" else kept
        call += 1
        return output

    by_hand = dit.runs.run(denoise, draw)
    plain = dit.runs.run(lambda *tensors: tail.run(*tensors)[0], draw)
    wanted = float((by_hand - plain).square().mean())
    cached = dit.cached(f"mask:{'1' * STEPS}")
    assert wanted > 1e-8
    assert dit.trials.forced(cached, draw, mask) == pytest.approx(wanted, rel=1e-4)
    assert dit.trials.forced(cached, draw, "1" * STEPS) == 0
    error, done = dit.trials.free(dit.cached(f"mask:{mask}"), draw)
    assert done == mask
    assert error == pytest.approx(wanted, rel=1e-4)


def test_calls_before_the_first_reuse_are_not_made_again(dit, monkeypatch):
    draw = dit.runs.draws(1, 0, None)[0]
    cached = dit.cached(f"mask:{'1' * STEPS}")
    dit.trials.uncached(draw)
    masks = []
    start = cached.start
    monkeypatch.setattr(cached, "start", lambda steps, mask: masks.append((steps, mask)) or start(steps, mask))
    dit.trials.forced(cached, draw, "11111010")
    assert masks == [(4, "1010")]


@pytest.fixture(scope="module")
def searched(dit, recorded, tmp_path_factory):
    calibration, _ = recorded
    path = tmp_path_factory.mktemp("search") / "mask.json"
    draws = dit.runs.draws(1, 0, None)
    return find_mask(dit, calibration, draws, Wishes(speedup=1.9), Bounds(12, longest=2), path, quiet)


def test_a_search_is_never_worse_than_where_it_starts(dit, searched):
    calibration, fitted = searched
    stages = fitted.fit["stages"]
    assert set(stages) == {
        "recorded distances, sum",
        "recorded distances, minimax",
        "measured segments, sum",
        "measured segments, minimax",
        "annealing and climbing",
    }
    best = stages["annealing and climbing"]
    assert best["mask"] == fitted.options["bits"] == fitted.masks[0]
    assert best["error"] == min(stage["error"] for stage in stages.values())
    assert all(stage["mask"].count("1") == 4 for stage in stages.values())
    draw = dit.runs.draws(1, 0, None)[0]
    assert dit.trials.forced(dit.cached("mask:11111111"), draw, best["mask"]) == pytest.approx(best["error"])
    # segments of one and two reuses: 7 + 6, of which none need to be tried twice
    assert 13 <= len(calibration.tried) <= 13 + 12 + 2
    assert calibration.tried_on == (0,)


def test_masks_that_were_tried_are_not_tried_again(dit, searched, tmp_path, monkeypatch):
    calibration, fitted = searched
    monkeypatch.setattr(type(dit.trials), "forced", lambda *_: pytest.fail("tried again"))
    draws, bounds = dit.runs.draws(1, 0, None), Bounds(12, longest=2)
    _, again = find_mask(dit, calibration, draws, Wishes(speedup=1.9), bounds, tmp_path / "c.json", quiet)
    assert again == fitted


def test_what_was_found_is_tried_on_other_seeds_and_read_by_a_cache(dit, searched, tmp_path):
    calibration, fitted = searched
    checked = check(dit, "mask", fitted, dit.runs.draws(2, 100, None), quiet)
    assert checked["seeds"] == [100, 101]
    assert checked["masks"] == [fitted.masks[0]] * 2
    assert checked["psnr_db"] == pytest.approx(decibels(checked["mean_squared_error"], 2.0))
    assert 15 < checked["psnr_db"] < 60
    assert checked["speedup"] >= 1.9
    path = tmp_path / "mask.json"
    finished(calibration, fitted, checked).write(path)
    assert parse(str(path)) == parse(f"mask:{fitted.masks[0]}")
    assert json.loads(path.read_text())["fit"]["checked"]["seeds"] == [100, 101]


def test_ratios_and_a_threshold_are_fitted_to_the_same_recording(dit, recorded):
    calibration, _ = recorded
    fitted = fit(replace(calibration, request="magcache:retention=0.1,limit=3"), Wishes(speedup=1.5))
    ratios = fitted.options["ratios"]
    assert len(ratios) == STEPS
    assert ratios[2] == pytest.approx(np.mean([s.ratios[2] for s in calibration.samples]))
    done = finished(replace(calibration, request="magcache:retention=0.1,limit=3"), fitted, None)
    assert (done.policy, done.fit["predicted"]["mask"]) == ("magcache", fitted.masks[0])
    assert done.fit["predicted"]["speedup"] >= 1.5


@pytest.fixture(scope="module")
def whole():
    request = "mask:granularity=output,payload=fitted,history=2"
    return subject(get("scenes-dit"), request, steps=STEPS, distance=STEPS - 1, weights="its own")


def test_fitted_weights_do_in_a_cache_what_they_did_in_the_search(whole, tmp_path):
    draws = whole.runs.draws(2, 0, None)
    calibration = record(whole, whole.blank, draws[:1], tmp_path / "run.json", quiet)
    bounds = Bounds(6)
    calibration, fitted = find_mask(whole, calibration, draws, Wishes(speedup=1.6), bounds, tmp_path / "c.json", quiet)
    assert "recorded products" in fitted.fit["stages"]
    bits, weights = fitted.options["bits"], fitted.options["weights"]
    assert (bits.count("1"), len(weights)) == (5, 2 * 3)
    path = tmp_path / "mask.json"
    finished(calibration, fitted, check(whole, "mask", fitted, draws, quiet)).write(path)
    policy = parse(str(path))
    assert policy.payload.history == 2
    checked = json.loads(path.read_text())["fit"]["checked"]
    assert checked["mean_squared_error"] == pytest.approx(calibration.tried[bits], rel=1e-3)
    repeated = whole.cached(f"mask:bits={bits},granularity=output,payload=value")
    error = sum(whole.trials.forced(repeated, draw, bits) for draw in draws) / len(draws)
    assert checked["mean_squared_error"] < error


@pytest.mark.parametrize("payload", ["taylor", "taylor-residual", "chebyshev"])
def test_a_forecast_is_tried_as_it_runs(whole, payload):
    draw, bits = whole.runs.draws(1, 3, None)[0], "11101001"
    cached = whole.cached(f"mask:bits={bits},granularity=output,payload={payload}")
    assert whole.trials.forced(cached, draw, bits) == pytest.approx(whole.trials.free(cached, draw)[0], rel=1e-3)


def test_weights_are_fitted_to_the_whole_model_alone(dit, recorded, tmp_path):
    other = replace(dit, request="mask:payload=fitted")
    with pytest.raises(UsageError, match="calibrated for the whole model, and granularity=stack was asked for; give"):
        find_mask(other, recorded[0], [Draw(0, "")], Wishes(), Bounds(), tmp_path / "c.json", quiet)


def test_masks_tried_with_another_payload_are_not_known(dit, recorded, tmp_path):
    path = tmp_path / "mask.json"
    replace(recorded[0], tried={"10101010": 0.5}, tried_on=(0,)).write(path)
    assert resume(dit.blank, path).tried == {"10101010": 0.5}
    assert resume(replace(dit.blank, request="mask:payload=value"), path).tried == {}


def test_without_the_model_a_mask_is_the_best_tried_or_what_distances_speak_for(recorded):
    calibration, _ = recorded
    guess = fit(calibration, Wishes(speedup=1.9))
    assert guess.options["bits"].count("1") == 4
    assert "was not tried here" in guess.notes[0]
    tried = {"10101010": 0.5, "11100100": 0.25, "11111000": 0.1}
    assert fit(replace(calibration, tried=tried), Wishes(speedup=1.9)).options["bits"] == "11100100"


def test_fits_that_cannot_be(recorded):
    calibration, _ = recorded
    with pytest.raises(UsageError, match="nothing is recorded yet"):
        fit(replace(calibration, request="magcache", samples=()), Wishes())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("taylorseer", "taylorseer has nothing to calibrate; these have: teacache"),
        ("teacache:model=flux", "teacache: model was given, which is what calibration finds"),
        ("smoothcache:schedule=1001", "smoothcache: schedule was given"),
        ("teacash", "no step-cache policy named 'teacash'.*Did you mean 'teacache'"),
        ("mask:granularity=deeep", "Did you mean 'deep'"),
    ],
)
def test_requests_that_cannot_be_calibrated(text, said):
    with pytest.raises(UsageError, match=said):
        requested(text)


@pytest.mark.parametrize(
    ("name", "wishes", "said"),
    [
        ("teacache", Wishes(alpha=0.1), "alpha is the error bound of smoothcache, and teacache"),
        ("smoothcache", Wishes(alpha=0.1, speedup=2), "give one of them"),
        ("mask", Wishes(speedup=0.5), "at least 1"),
    ],
)
def test_wishes_that_do_not_go_together(name, wishes, said):
    with pytest.raises(UsageError, match=said):
        check_wishes(name, wishes)


def test_a_mask_to_start_from_must_have_the_runs_length(dit, recorded, tmp_path):
    short = replace(dit, request="mask:1010")
    with pytest.raises(UsageError, match="4 decisions were given for a run of 8 steps"):
        find_mask(short, recorded[0], [Draw(0, "")], Wishes(), Bounds(), tmp_path / "c.json", quiet)


def test_a_model_that_is_not_bundled_runs_on_its_example_inputs():
    adapter = get("dit-xl-2-reduced")
    runs = runs_of(adapter, 4, None)
    times, seen = [], []

    def denoise(hidden_states, timestep, class_labels):
        times.append(float(timestep[0]))
        seen.append(hidden_states.clone())
        return torch.ones(2, 8, 8, 8)  # a variance beside the prediction

    first, other = (runs.run(denoise, draw) for draw in runs.draws(2, 7, None))
    assert times == [999.0, 750.0, 500.0, 250.0] * 2
    torch.testing.assert_close(seen[1], seen[0] - 0.25)
    torch.testing.assert_close(first, seen[0].double() - 1)
    assert not torch.equal(first, other)
    assert "not the model's own sampler" in runs.how
    with pytest.raises(UsageError, match="labels are for bundled models"):
        runs.draws(1, 0, [3])
    with pytest.raises(UsageError, match="guidance 2 was given"):
        runs_of(adapter, 4, 2.0)
    with pytest.raises(UsageError, match="has no input 'timestep'"):
        runs_of(get("sd15-vae-decoder-reduced"), 4, None)
