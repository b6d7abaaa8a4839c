"""``calibrate``: from a bundled model to a file that ``--cache`` reads, in few steps."""

import json
import shutil

import pytest

from hasten.backends.calibrate_file import read
from hasten.models.scenes.adapters import FOLDER
from hasten.passes.steps.catalog import parse

pytestmark = pytest.mark.skipif(not (FOLDER / "dit.safetensors").is_file(), reason="the weights are not trained yet")
RUN = ("--steps", 7, "--guidance", 1, "--check", 1)
WORDS = ("scenes-dit", "--cache", "teacache:last=0", "--order", 1, *RUN)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    from hasten.tools import cli

    monkeypatch.setitem(
        cli.VERBS, "calibrate", "record a model's runs, fit a step cache to them, write a file for --cache"
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Two samples in one file, made by one command line."""
    from hasten.tools import cli

    path = tmp_path_factory.mktemp("calibrated") / "teacache.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.VERBS, "calibrate", "")
        words = ["calibrate", *WORDS, "--samples", 2, "--speedup", 1.6, "-o", path, "-q"]
        assert cli.main([str(w) for w in words]) == 0
    return path


def test_a_cache_reads_the_polynomial_its_range_and_the_threshold(calibrated):
    decision = parse(str(calibrated)).decision
    fit = read(calibrated).fit
    assert decision.coefficients == tuple(fit["polynomial"]["coefficients"])
    assert len(decision.coefficients) == 2
    assert decision.fitted == fit["polynomial"]["high"]
    assert decision.retained.last == 0  # as it was asked for
    assert fit["predicted"]["speedup"] >= 1.6
    assert fit["polynomial"]["points"] == 12
    assert all(row["mask"][0] == "1" and len(row["mask"]) == 7 for row in fit["thresholds"])
    assert len(fit["checked"]["masks"]) == 1
    assert fit["checked"]["psnr_db"] > 10


def test_what_is_shown_and_what_is_printed_as_json(calibrated, hasten, tmp_path):
    path = tmp_path / "teacache.json"
    shutil.copy(calibrated, path)
    done = hasten("calibrate", *WORDS, "--samples", 2, "-o", path)
    assert done.code == 0
    assert "polynomial of order 1 against the residual: R^2" in done.out
    assert "fitted on 12 distances" in done.out
    assert f"wrote {path}, which --cache takes" in done.out.replace("\n", " ")
    assert "a reused call costs 1.0% of a call" in done.err
    assert "recording 0 of 2 runs, 0 calls" in done.err  # they are in the file already
    document = hasten("calibrate", *WORDS, "--samples", 2, "-o", path, "--json").json
    assert document["policy"] == "teacache"
    assert document["samples"] == 2
    assert document["options"]["coefficients"] == json.loads(path.read_text())["options"]["coefficients"]
    assert document["outputs"] == [str(path)]


def test_one_more_sample_and_other_seeds_then_merged(calibrated, hasten, tmp_path):
    path, other, both = (tmp_path / name for name in ("more.json", "other.json", "both.json"))
    shutil.copy(calibrated, path)
    assert hasten("calibrate", *WORDS, "--samples", 3, "-o", path, "-q").code == 0
    assert [s.seed for s in read(path).samples] == [0, 1, 2]
    before = read(calibrated).samples
    assert read(path).samples[1].values["signal"].size.tolist() == before[1].values["signal"].size.tolist()
    assert hasten("calibrate", *WORDS, "--samples", 2, "--seed", 2, "-o", other, "-q").code == 0
    done = hasten("calibrate", "--merge", path, other, "--order", 2, "--speedup", 1.3, "-o", both)
    assert done.code == 0, done.err
    merged = read(both)
    assert [s.seed for s in merged.samples] == [0, 1, 2, 2, 3]  # seed 2 drew two classes
    assert len(merged.options["coefficients"]) == 3
    assert merged.fit["polynomial"]["points"] == 30
    assert parse(str(both)).decision.threshold == merged.options["threshold"]


def test_a_mask_is_searched_and_other_settings_refused(hasten, tmp_path):
    path = tmp_path / "mask.json"
    words = ("--cache", "mask:granularity=output", *RUN, "--samples", 1, "--speedup", 1.7, "-o", path)
    done = hasten("calibrate", "scenes-dit", *words, "--budget", 5)
    assert done.code == 0
    assert "annealing and climbing" in done.out
    policy = parse(str(path))
    assert policy.granularity == "output"
    assert policy.decision.bits.count("1") == 4
    refused = hasten("calibrate", "scenes-dit", *words, "--distance", 2)
    assert refused.code == 2
    assert "holds another recording: distance 2 and 6" in refused.err


def test_the_plot(calibrated, hasten, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curves.png"
    done = hasten("calibrate", "--merge", calibrated, "--order", 1, "-o", tmp_path / "c.json", "--plot", plot)
    assert done.code == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_nothing_is_recorded(hasten, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = hasten("calibrate", *WORDS, "-o", tmp_path / "c.json", "--plot", tmp_path / "p.png")
    assert done.code == 4
    assert "pip install 'hasten[bench]'" in done.err
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_not_gone_on_with(calibrated, hasten, tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(calibrated.read_text()[:1000])
    done = hasten("calibrate", "--merge", path, "-o", tmp_path / "c.json")
    assert done.code == 2
    assert "is damaged or cut short" in done.err
    assert done.err.count("\n") == 1


def test_a_recording_with_nan_in_it_is_not_fitted(calibrated, hasten, tmp_path):
    content = json.loads(calibrated.read_text())
    content["samples"][1]["values"]["signal"]["size"][3] = None
    path = tmp_path / "nan.json"
    path.write_text(json.dumps(content))
    done = hasten("calibrate", "--merge", path, "--order", 1, "-o", tmp_path / "c.json")
    assert done.code == 1
    assert "signal is nan at step 3" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cache", "teacache"), "give a model and --cache POLICY to record, or --merge"),
        (("scenes-dit",), "give a model and --cache POLICY"),
        (("scenes-dit", "--cache", "taylorseer"), "taylorseer has nothing to calibrate"),
        (("scenes-dit", "--cache", "teacache:model=flux"), "model was given, which is what calibration finds"),
        (("scenes-dit", "--cache", "teacache", "--alpha", "0.1"), "alpha is the error bound of smoothcache"),
        (("scenes-dit", "--cache", "teacache", "--budget", "9"), "--budget is for the search of a mask"),
        (("scenes-dit", "--cache", "easycache", "--speedup", "0.5"), "give at least 1"),
        (("scenes-dit", "--cache", "teacache", "--steps", "2"), "whole number from 3 up"),
        (("scenes-dot", "--cache", "teacache"), "Did you mean 'scenes-dit'"),
        (("scenes-dit", "--cache", "teacache", "--labels", "a"), "is not a list of classes"),
        (("scenes-dit", "--cache", "teacache", "--merge", "x.json"), "--merge fits what was recorded, and a model"),
        (("--merge", "nowhere.json"), "No such file"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(hasten, tmp_path, words, said):
    done = hasten("calibrate", *words, "-o", tmp_path / "c.json")
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_few_samples_for_the_order(calibrated, hasten, tmp_path):
    done = hasten("calibrate", "--merge", calibrated, "--order", 6, "-o", tmp_path / "c.json")
    assert done.code == 2
    assert "a polynomial of order 6 needs at least 14 points, and 12 were recorded" in done.err
