"""``hasten bench --solver`` and ``--cache``: what is measured, in which order, and what is refused before a build."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from hasten.errors import UsageError
from hasten.models.scenes.adapters import FOLDER
from hasten.tools.bench_solver import names_of
from hasten.tools.bench_sweep import rounds

needs_weights = pytest.mark.skipif(not (FOLDER / "dit.safetensors").is_file(), reason="the bundled weights are missing")
QUICK = ("--count", 1, "--rounds", 1, "--cache-target", "onnxruntime:cpu", "-q")


@needs_weights
def test_solvers_in_one_engine(hasten: Any, tmp_path: Any) -> None:
    """Evaluations are counted, the finest solver is nearest, and noise has no PSNR."""
    pytest.importorskip("matplotlib", reason="pip install 'hasten[bench]'")
    words = ("bench", "scenes-dit", "--solver", "dpm++2m:compat=none,heun", "--solver", "flow-euler:stochastic=true")
    files = ("--jsonl", tmp_path / "rows.jsonl", "--plot", tmp_path / "plot.png", "--json")
    done = hasten(*words, "--steps", "2,6", "--fine", 6, *QUICK, *files)
    assert done.code == 0, done.err
    document = done.json
    found = {(s["solver"], s["steps"]): s for s in document["settings"]}
    assert len(found) == len(document["settings"]) == 6
    counted = [found[name, n]["evaluations"] for name in ("dpm++2m:compat=none", "heun") for n in (2, 6)]
    assert counted == [2, 6, 3, 11]
    assert found["dpm++2m:compat=none", 6]["psnr_db"] is None  # the fine solution itself
    assert found["dpm++2m:compat=none", 2]["psnr_db"] < found["heun", 6]["psnr_db"]
    noisy = found["flow-euler:stochastic=true", 6]
    assert (noisy["stochastic"], noisy["psnr_db"]) == (True, None)
    for setting in found.values():
        assert 0 < setting["seconds"]["p20"] <= setting["seconds"]["median"] <= setting["seconds"]["p80"]
        assert 0 <= setting["accuracy"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [s["seconds"] for s in document["settings"]]
    assert {line["fine"]["steps"] for line in lines} == {6}
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@needs_weights
def test_caches_and_clipping_beside_solvers(hasten: Any) -> None:
    words = (
        "--solver",
        "flow-euler,dpm++2m:clip=1.5",
        "--steps",
        8,
        "--cache",
        "first-block",
        "--thresholds",
        "0.05,0.4",
    )
    done = hasten("bench", "scenes-dit", *words, "--fine", 20, *QUICK, "--json")
    assert done.code == 0, done.err
    found = {(s["solver"], s["cache"], s["threshold"]): s for s in done.json["settings"]}
    assert len(found) == 6
    for solver in ("flow-euler", "dpm++2m:clip=1.5"):
        assert found[solver, None, None]["evaluations"] == 8
        assert found[solver, "first-block", 0.4]["evaluations"] < found[solver, "first-block", 0.05]["evaluations"] <= 8


@pytest.mark.slow
@needs_weights
def test_caches_alone(hasten: Any, tmp_path: Any) -> None:
    """Against the same engine that computes every step."""
    words = ("bench", "scenes-dit", "--cache", "first-block", "--thresholds", "0.0001,0.3", "--steps", 8)
    done = hasten(*words, *QUICK, "--json", "--plot", tmp_path / "caches.svg")
    assert done.code == 0, done.err
    none, some = done.json["settings"]
    assert (none["computed"], none["psnr_db"], none["ssim"]) == (8, None, pytest.approx(1))
    assert some["computed"] < 8
    assert some["psnr_db"] > 10
    assert some["mask"].count("1") == some["computed"]
    assert (tmp_path / "caches.svg").read_text().startswith("<?xml")


def test_lists_of_solvers() -> None:
    assert names_of(["ddim,unipc:order=3,levels=karras,heun", "ddim"]) == [
        "ddim",
        "unipc:order=3,levels=karras",
        "heun",
    ]
    assert names_of(["dpm++2m,order=3"]) == ["dpm++2m:order=3"]
    with pytest.raises(UsageError, match="no solver named 'unipcc'"):
        names_of(["ddim,unipcc"])


def test_runs_take_turns_and_the_first_round_is_not_timed() -> None:
    seen: list[str] = []

    def run(name: str) -> int:
        seen.append(name)
        time.sleep(0.02 if len(seen) <= 2 else 0)
        return len(seen)

    made, times = rounds({"a": lambda: run("a"), "b": lambda: run("b")}, 3, lambda *_: None)
    assert seen == ["a", "b"] * 4
    assert made == {"a": 7, "b": 8}
    assert {len(t.seconds) for t in times.values()} == {3}
    assert max(times["a"].seconds + times["b"].seconds) < 0.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--solver", "ddim"), "--solver: name a bundled model, such as scenes-dit"),
        (("scenes-unt", "--solver", "ddim"), "'scenes-unt' is none; there are .* Did you mean 'scenes-unet'"),
        (("scenes-unet", "--solver", "dimm"), "no solver named 'dimm'.* Did you mean 'ddim'"),
        (
            ("scenes-dit", "--solver", "ddim"),
            "ddim is for diffusion processes, and this model is a flow; take flow-euler",
        ),
        (("scenes-unet", "--solver", "stsp"), "it asks two networks, and the sweep's engines hold one"),
        (("scenes-unet", "--solver", "ddim:clip=1,threshold=0.9"), "clip and threshold are two ways"),
        (
            ("scenes-unet", "--solver", "ddim:clip=1,unipc:threshold=0.99"),
            "an engine clips x0 or thresholds it, not both; sweep over these in two runs",
        ),
        (("scenes-unet", "--solver", "ddim", "--steps", "5,x"), "'x' is not a whole number from 1 up"),
        (("scenes-unet", "--cache", "fora", "--steps", "5,10"), "a sweep over caches alone has one number of steps"),
    ],
)
def test_a_sweep_that_cannot_be_meant(hasten: Any, words: tuple[str, ...], message: str, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr("hasten.backends.build.build", refuse)
    done = hasten("bench", *words)
    assert done.code == 2
    assert re.search(message, done.err), done.err
