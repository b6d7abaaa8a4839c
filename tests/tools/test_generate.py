"""``generate``: the bundled models, plain and optimised; one package of AOTInductor and one ONNX Runtime engine."""

import json

import pytest
import torch
from PIL import Image

from hasten.models.scenes.adapters import FOLDER
from hasten.tools.cli import main
from hasten.tools.quality import psnr

pytestmark = pytest.mark.skipif(
    not (FOLDER / "unet.safetensors").is_file() or not (FOLDER / "dit.safetensors").is_file(),
    reason="the bundled weights are not trained yet",
)


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """One picture without guidance: an AOTInductor package takes half a minute."""
    out = tmp_path_factory.mktemp("unet")
    words = ["generate", "scenes-unet", "-o", out, "--count", 1, "--guidance", 1, "--steps", 3, "--repeat", 2, "-q"]
    assert main([str(w) for w in words]) == 0
    return out


def test_unet_by_aotinductor(unet):
    document = json.loads((unet / "scenes-unet.json").read_text())
    assert document["target"] == "aoti:cpu"
    baseline, optimised = document["results"]
    assert baseline["psnr_db"] is None
    assert optimised["psnr_db"] is None or optimised["psnr_db"] > 60
    assert optimised["speedup"]["runs"] == 2
    hits = {r["name"]: r["hits"] for r in document["rules"]}
    assert (hits["group-norm-act"], hits["attention"], hits["upsample-conv"]) == (21, 4, 1)


def test_the_rows_of_the_picture_are_the_same_but_for_their_labels(unet):
    picture = Image.open(unet / "scenes-unet.png").convert("RGB")
    side, gap = 32 * 3, 6  # one column: the picture stands at the right end, a gap beside and below it
    left, row = picture.width - side - gap, side + gap
    first, second = (
        picture.crop((left, picture.height - n * row, left + side, picture.height - n * row + side)).tobytes()
        for n in (2, 1)
    )
    assert len(set(first)) > 20
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1


def test_the_engine_it_leaves_can_be_run_and_compared(unet, hasten):
    engine = unet / "scenes-unet"
    document = hasten("compare", "scenes-unet", engine, "--repeat", 1, "--json").json
    assert document["passed"] is True
    assert document["inputs"]["class_labels"]["dtype"] == "int64"
    assert hasten("run", engine, "--seed", 3).code == 0


def test_dit_where_there_is_no_compiler_says_so(hasten, tmp_path, monkeypatch):
    monkeypatch.setattr("hasten.backends.inductor.have_cxx_compiler", lambda: False)
    words = ("--count", 2, "--labels", "0,15", "--steps", 2, "--repeat", 2, "--against", "onnxruntime", "--json")
    done = hasten("generate", "scenes-dit", "-o", tmp_path, *words)
    assert done.code == 0
    assert done.err == (
        "hasten generate: there is no C++ compiler here (apt install g++, or set CXX), so the target is "
        "onnxruntime:cpu instead of aoti:cpu\n"
    )
    document = done.json
    assert document == json.loads((tmp_path / "scenes-dit.json").read_text())
    assert document["target"] == "onnxruntime:cpu"
    assert document["labels"] == [0, 15]
    assert [r["name"] for r in document["results"]] == [
        "baseline (eager PyTorch)",
        "hasten (onnxruntime:cpu)",
        "onnxruntime",
    ]
    assert all(r["psnr_db"] is None or r["psnr_db"] > 60 for r in document["results"])
    assert document["outputs"] == [str(tmp_path / n) for n in ("scenes-dit.png", "scenes-dit.json", "scenes-dit")]


def test_a_seed_of_64_bits(hasten, tmp_path):
    """Both contenders are given the same noise by it, and not that of another seed."""
    words = ("--count", 2, "--guidance", 1, "--steps", 2, "--repeat", 1, "--target", "onnxruntime:cpu", "-q", "--json")
    made = []
    for seed in (2**41, 2**64 - 1):
        done = hasten("generate", "scenes-dit", "-o", tmp_path / str(seed), "--seed", seed, *words)
        assert done.code == 0, done.err
        assert done.json["seed"] == seed
        assert done.json["results"][1]["max_abs_difference"] < 1e-3
        made.append((tmp_path / str(seed) / "scenes-dit.png").read_bytes())
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["scenes-dit", "--seed", str(2**64)],
            "seed: 18446744073709551616 given; give 0 or more, up to 2**64 - 1",
        ),
        (["scenes-dit", "--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 up"),
        (["sd15-unet"], "'sd15-unet' is no bundled model; there are scenes-unet, scenes-dit, scenes-video."),
        (
            ["scenes-dti"],
            "'scenes-dti' is no bundled model; there are scenes-unet, scenes-dit, scenes-video. Did you mean",
        ),
        (
            ["scenes-unet", "--labels", "0,16"],
            "argument --labels: '0,16' is not a list of classes from 0 to 15, as in 0,5,10",
        ),
        (
            ["scenes-unet", "--against", "inductr"],
            "argument --against: 'inductr' is none of inductor, onnxruntime. Did you mean 'inductor'? "
            "(hasten generate --help)",
        ),
        (
            ["scenes-unet", "--target", "aoti:cuda"],
            "target aoti:cuda: pictures are generated on the CPU; take aoti:cpu, onnxruntime:cpu or inductor:cpu",
        ),
    ],
)
def test_wrong_usage(hasten, tmp_path, words, message):
    done = hasten("generate", *words, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"hasten generate: {message}")


def test_psnr():
    black, grey = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), -0.8)
    assert psnr(black, black) is None
    assert psnr(black, grey) == pytest.approx(20.0, abs=1e-4)
