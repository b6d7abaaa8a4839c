"""``generate --picard``: predicted before it runs, refused where it loses, and what happens when a process is lost."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hasten.backends.engine import load
from hasten.models.processes import process_of
from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.picard_gain import Gain
from hasten.passes.solvers.picard_sweeps import expected_sweeps
from hasten.tools import generate_picard, picard_build, picard_team

GENERATE = ("generate", "scenes-dit", "--target", "onnxruntime:cpu", "--count", 1, "--steps", 6, "--guidance", 1, "-q")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A folder for the engines of all tests."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(autouse=True)
def built_once(engines, monkeypatch):
    """Engines are built by the first test that asks for them."""
    of_network, of_window = picard_build.of_network, picard_build.of_window

    def network(adapter, samples, chosen, folder, args, tell):
        known = engines / f"{adapter.name}-batch-{samples}"
        return load(known) if known.is_dir() else of_network(adapter, samples, chosen, engines, args, tell)

    def window(adapter, pictures, window, table, chosen, folder, args, tell):
        known = engines / f"{adapter.name}-window-{window}-batch-{pictures}"
        own = known.is_dir() and load(known).inputs[0].shape[1] == table.width
        return load(known) if own else of_window(adapter, pictures, window, table, chosen, engines, args, tell)

    monkeypatch.setattr(picard_build, "of_network", network)
    monkeypatch.setattr(picard_build, "of_window", window)


def measured(monkeypatch, seconds_of_a_row, seconds_of_a_window):
    """Let the machine be one on which calls take so long."""
    monkeypatch.setattr(generate_picard, "_measured", lambda call: seconds_of_a_row)
    monkeypatch.setattr(picard_team.Team, "measure", lambda self: seconds_of_a_window)


def test_exact_is_the_plain_loop(hasten, tmp_path, monkeypatch):
    measured(monkeypatch, 1.0, 0.5)
    done = hasten(*GENERATE, "-o", tmp_path, "--picard", "exact=true,window=4", "--json")
    assert done.code == 0
    found = done.json["picard"]
    assert done.json == json.loads((tmp_path / "scenes-dit.json").read_text())
    assert found["predicted_speedup"] == pytest.approx(6 / (0.5 * found["predicted_sweeps"]))
    assert (found["tolerance"], found["rows"], found["compiled"]) == (0, 6, True)
    assert found["sweeps"] <= 6 < found["evaluations"]
    # a call on four rows rounds as it likes
    assert found["psnr_to_plain_db"] is None or found["psnr_to_plain_db"] > 90
    assert (tmp_path / "scenes-dit.png").is_file()
    names = [r["name"] for r in done.json["results"]]
    assert names == [
        "baseline (eager PyTorch)",
        "hasten (onnxruntime:cpu)",
        "hasten (onnxruntime:cpu), Picard",
    ]


def test_two_processes_and_an_acceleration_make_the_same_pictures(hasten, tmp_path, monkeypatch):
    """And the other one ends by itself, with nothing to complain of."""
    started = []

    def start(*words, **options):
        with open(tmp_path / "said", "wb") as file:
            started.append(subprocess.Popen(*words, **options, stderr=file))
        return started[-1]

    monkeypatch.setattr(picard_team, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
    words = "tolerance=0.001,window=4,processes=2,acceleration=2,force=true"
    done = hasten(*GENERATE, "-o", tmp_path, "--picard", words, "--json")
    assert done.code == 0
    quality = done.json["picard"]["psnr_to_plain_db"]
    assert quality is None or quality > 60
    assert (done.json["picard"]["processes"], done.json["picard"]["compiled"]) == (2, False)
    assert [process.returncode for process in started] == [0]
    assert "Traceback" not in (tmp_path / "said").read_text()


def test_it_is_refused_where_it_is_predicted_to_lose(hasten, tmp_path, monkeypatch):
    measured(monkeypatch, 1.0, 4.0)
    done = hasten(*GENERATE, "-o", tmp_path, "--picard", "window=4")
    assert (done.code, done.out) == (2, "")
    sweeps = expected_sweeps(build("flow-euler", process_of("scenes-dit"), 6), 4, 0.1)
    assert f"picard: {sweeps} sweeps over 4 rows take {sweeps} x 4 s and the plain loop 6 x 1 s" in done.err
    assert "with force it runs all the same" in done.err
    assert not (tmp_path / "scenes-dit.png").exists()


def test_a_process_that_is_lost(hasten, tmp_path, monkeypatch):
    dies = (
        "import sys, os; from pathlib import Path; from hasten.tools import picard_team as t\n"
        "t.Member.run = lambda *a: os._exit(9)\n"
        "t.main(int(sys.argv[1]), Path(sys.argv[2]))"
    )
    monkeypatch.setattr(
        picard_team, "command", lambda rank, folder: [sys.executable, "-c", dies, str(rank), str(folder)]
    )
    done = hasten(*GENERATE, "-o", tmp_path, "--picard", "window=4,processes=2,force=true")
    assert done.code == 1
    assert "Picard over 2 processes: process 0 lost the connection to another" in done.err
    assert not (tmp_path / "scenes-dit.png").exists()


def test_a_solver_whose_sweeps_are_not_known_runs_where_it_is_forced(hasten, tmp_path, engines):
    words = [word if word != "scenes-dit" else "scenes-unet" for word in GENERATE]
    done = hasten(*words, "-o", tmp_path / "a", "--solver", "ipndm", "--picard", "window=6")
    assert done.code == 2
    assert "its sweeps cannot be told before the run; take another solver, or force the run" in done.err
    assert not list(engines.glob("scenes-unet*"))
    done = hasten(
        *words, "-o", tmp_path / "b", "--solver", "ipndm", "--picard", "window=6,exact=true,force=true", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["picard"]["predicted_speedup"] is None
    quality = done.json["picard"]["psnr_to_plain_db"]
    assert quality is None or quality > 90


def test_a_solver_that_clips_x0_asks_the_network_alone(hasten, tmp_path, monkeypatch):
    monkeypatch.setattr(picard_build, "of_window", None)
    words = ("--solver", "flow-euler:clip=1", "--picard", "window=1,exact=true,force=true", "--json")
    done = hasten(*GENERATE, "-o", tmp_path, *words)
    assert done.code == 0, done.err
    found = done.json["picard"]
    assert (found["compiled"], found["sweeps"], found["psnr_to_plain_db"]) == (False, 6, None)


def test_a_solver_of_two_networks_is_refused_before_anything_is_built(hasten, tmp_path, monkeypatch):
    monkeypatch.setattr(picard_build, "of_network", None)
    words = ("--solver", "stsp:order=1,spacing=leading,offset=1", "--picard", "window=4,force=true")
    done = hasten("generate", "scenes-unet", "-o", tmp_path, "--target", "onnxruntime:cpu", "--steps", 3, *words)
    assert (done.code, done.out) == (2, "")
    assert "--picard asks one network for many rows at once, and --solver stsp:order=1" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tolerance=inf", "picard: tolerance: inf was given, with which nothing is ever waited for; 0.1 is usual"),
        ("tolerance=0", "picard: tolerance: 0 was given; it is above 0; exact=true makes the plain loop's result"),
        ("tolerance=-1", "picard: tolerance: -1 was given; it goes from 0 (how much a settled state may change"),
        ("exact=true,tolerance=0.1", "picard: exact=true waits until nothing changes, and tolerance is not for it"),
        ("window=0", "picard: window: 0 was given; it goes from 1 (rows at once)"),
        (
            "windw=4",
            "picard has no option 'windw'; its options: tolerance, exact, window, acceleration, processes, ",
        ),
        ("window", "picard: option 'window' is not written key=value"),
        ("window=4,window=5", "picard: option 'window' is given twice"),
    ],
)
def test_wrong_options(hasten, tmp_path, words, message):
    done = hasten("generate", "scenes-dit", "-o", tmp_path / "out", "--picard", words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--cache", "fora"), ("--target", "inductor:cpu")])
def test_what_it_is_not_for(hasten, tmp_path, words):
    done = hasten("generate", "scenes-dit", "-o", tmp_path, "--picard", "window=4", *words)
    assert done.code == 2
    assert f"--picard asks an engine for many rows at once; {words[0]}" in done.err


@pytest.mark.parametrize(("model", "solver", "sweeps"), [("scenes-unet", "ddim", 13), ("scenes-dit", "flow-euler", 14)])
def test_sweeps_are_predicted_nearly(model, solver, sweeps):
    """What 50 steps of the models took with a window of 8 and a tolerance of 0.1."""
    table = build(f"{solver}:spacing=trailing,compat=none" if solver == "ddim" else solver, process_of(model), 50)
    assert abs(expected_sweeps(table, 8, 0.1) - sweeps) <= 2
    assert expected_sweeps(table, 50, 0.1) < expected_sweeps(table, 8, 0.1) < expected_sweeps(table, 8, 1e-4) < 50
    assert np.isfinite(Gain(1.0, 2.0).factor)
