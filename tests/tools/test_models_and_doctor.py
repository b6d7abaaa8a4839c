"""``models`` and ``doctor``: what is there, with and without the optional packages."""

import sys

from hasten.models.registry import names
from hasten.tools import doctor


def test_models_lists_every_name_with_its_patterns(hasten):
    rows = {row["name"]: row for row in hasten("models", "--json").json["models"]}
    assert list(rows) == [n for n in names() if not n.endswith("-reduced")]
    assert rows["sd15-unet"]["parameters"] == 859_520_964
    assert rows["sd15-unet"]["expected"]["attention"] == 32
    assert rows["sd15-unet"]["reduced"] is True
    assert [n for n, row in rows.items() if row["trained"]] == ["scenes-unet", "scenes-dit", "scenes-video"]


def test_models_without_diffusers_still_names_them(hasten, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    done = hasten("models")
    assert done.code == 0
    assert "scenes-unet" in done.out
    assert "flux-dev" in done.out
    assert done.err == (
        "hasten models: parameters and patterns need diffusers: diffusers is not installed: "
        "pip install 'hasten[diffusers]'\n"
    )


def test_doctor_knows_every_backend(hasten):
    from hasten.backends.target import BACKENDS

    document = hasten("doctor", "--json").json
    assert document.keys() == {"system", "packages", "targets"}
    assert {row["target"].partition(":")[0] for row in document["targets"]} == set(BACKENDS)
    assert document["packages"]["torch"]["version"]
    onnxruntime = next(row for row in document["targets"] if row["target"] == "onnxruntime:cpu")
    assert onnxruntime == {"target": "onnxruntime:cpu", "build": None, "run": None}


def test_doctor_gives_the_command_for_what_is_missing(hasten, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("hasten.backends.inductor.have_cxx_compiler", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "diffusers" else "1.0")
    document = hasten("doctor", "--json").json
    reasons = {row["target"]: row["build"] for row in document["targets"]}
    assert reasons["tensorrt-rtx:smXX"] == "tensorrt_rtx is not installed: pip install 'hasten[tensorrt-rtx]'"
    assert reasons["aoti:cpu"] == (
        "target aoti:cpu compiles C++ and 'no-such-compiler' was not found: apt install g++, or set CXX to a C++17 "
        "compiler; onnxruntime:cpu needs none"
    )
    assert document["packages"]["diffusers"] == {"version": None, "install": "pip install 'hasten[diffusers]'"}
    assert document["system"]["c++ compiler"] is None
    shown = hasten("doctor").out
    assert "pip install 'hasten[diffusers]'" in shown
    assert "none: apt install g++, or set CXX" in shown
