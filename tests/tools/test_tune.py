"""``hasten tune``: what is timed, kept, shown and removed. Nothing real is timed here."""

import time

import pytest

from hasten.backends.tuning_file import Measurement, Timing
from hasten.backends.tuning_machine import Machine
from hasten.backends.tuning_store import Store
from hasten.passes.choice import Layer

SMALL = "conv:64-64@8x8,threads=1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of its own, kernels that are not built, and runners that sleep instead of computing."""
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("hasten.backends.tuning_machine.native_kernels", lambda *, load=True: "abc")
    seconds = {"direct": 4e-3, "f2": 3e-3, "f4": 1e-3, "f6": 2e-3}

    class Sleeping:
        def __call__(self, layer, name):
            way = "phases" if (layer.op, name) == ("upsample_conv2d", "direct") else ""
            return {way: lambda: time.sleep(seconds[name.rpartition("-")[2]])}

    monkeypatch.setattr("hasten.backends.tuning_runners.TorchRunners", Sleeping)
    monkeypatch.setattr("hasten.backends.tuning_measure._interruptions", lambda: 0)
    return tmp_path / "cache"


def put(cache, here=None):
    """One entry, of this machine or another."""
    store = Store(cache / "tuning.json", native="abc", machines=None if here is None else lambda device: here)
    timings = {"direct": Timing(2e-3, 2e-3, 2e-3, 3, "prepacked"), "winograd-f4": Timing(1e-3, 1e-3, 1e-3, 3)}
    store.put(Layer("conv2d", 1, 64, 64, 8, 8), Measurement(timings, {"winograd-f2": "E: x"}, "2026-01-01T00:00:00"))


def test_layers_are_timed_chosen_and_kept(hasten, cache):
    done = hasten("tune", SMALL, SMALL, "upsample-conv:64-64@8x8,threads=1", "conv:8-8@8x8", "--rounds", "2")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["layer", "sites", "chosen", "predicted", "direct", "f2", "f4", "f6", "more", "weights"]
    assert lines[1][:3] == [SMALL, "2", "winograd-f4"]
    assert lines[2][:3] == ["upsample-conv:64-64@8x8,threads=1", "1", "winograd-phases-f4"]
    assert "(phases)" in lines[2]
    assert lines[3][1:3] == ["1", "direct"]
    assert "3 timed sites: " in done.out
    assert done.out.rstrip().endswith(" times as fast)")
    assert len(Store(native="abc").here()) == 2


def test_the_document(hasten, cache):
    done = hasten("tune", SMALL, "--rounds", "2", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["file"] == str(cache / "tuning.json")
    (row,) = done.json["layers"]
    assert (row["layer"], row["sites"], row["implementation"]) == (SMALL, 1, "winograd-f4")
    assert row["reason"].startswith("measured ")
    assert set(row["measurement"]["timings"]) == {"direct", "winograd-f2", "winograd-f4", "winograd-f6"}
    assert row["measurement"]["timings"]["direct"]["rounds"] == 2


def test_what_is_kept_is_not_timed_again(hasten, cache):
    hasten("tune", SMALL, "--rounds", "2")
    before = (cache / "tuning.json").read_bytes()
    hasten("tune", SMALL, "--rounds", "1")
    assert (cache / "tuning.json").read_bytes() == before
    hasten("tune", SMALL, "--rounds", "1", "--again")
    assert (cache / "tuning.json").read_bytes() != before


def test_a_machine_without_kernels_is_told_that_it_is_in_vain(hasten, cache, monkeypatch):
    monkeypatch.setattr("hasten.backends.tuning_machine.native_kernels", lambda *, load=True: "none")
    monkeypatch.setattr("hasten.passes.ops.native.build.load", lambda: "HASTEN_NATIVE=0 turns the C++ kernels off")
    done = hasten("tune", SMALL, "--rounds", "1")
    assert done.code == 0
    assert done.err == (
        "hasten tune: builds for the CPU keep the library's convolutions, whatever is timed now, since "
        "HASTEN_NATIVE=0 turns the C++ kernels off\n"
    )


def test_threads_are_part_of_the_layer(hasten, cache):
    hasten("tune", "conv:64-64@8x8,threads=3", "--rounds", "1")
    assert [layer.threads for layer in Store(native="abc").here()] == [3]


def test_the_convolutions_of_a_program(hasten, cache, pt2_file):
    done = hasten("tune", pt2_file, "--threads", "1")
    assert (done.code, done.err) == (0, "")
    assert "conv:4-32@8x8,batch=2,threads=1" in done.out
    assert done.out.endswith("nothing was timed: no layer has more than one implementation\n")


def test_a_model_without_such_convolutions(hasten, cache):
    done = hasten("tune", "scenes-dit", "--threads", "1")
    assert (done.code, done.err) == (0, "")
    assert done.out == "there is no 3x3 convolution with stride 1 and known sizes: nothing to choose\n"


def test_an_implementation_that_fails_is_named(hasten, cache):
    put(cache)
    done = hasten("tune", "--show")
    assert f"winograd-f2 of {SMALL} failed: E: x" in done.out


def test_show(hasten, cache):
    path = cache / "tuning.json"
    assert hasten("tune", "--show").out == (
        f"{path}: 0 layers timed on this machine, 0 of other machines or versions\n"
    )
    put(cache)
    put(cache, Machine("another", "torch 1"))
    done = hasten("tune", "--show")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["layer", "direct", "f2", "f4", "date"]
    assert lines[1] == [SMALL, "2", "ms", "failed", "1", "ms", "2026-01-01T00:00:00"]
    assert done.out.endswith(f"\n{path}: 1 layer timed on this machine, 1 of other machines or versions\n")
    document = hasten("tune", "--show", "--json").json
    assert (document["file"], document["foreign"]) == (str(path), 1)
    assert document["layers"][0]["layer"] == SMALL
    system = hasten("doctor", "--json").json["system"]
    assert system["tuning"] == f"{path}: 1 layer timed on this machine, 1 of other machines or versions"


def test_clear(hasten, cache):
    path = cache / "tuning.json"
    assert hasten("tune", "--clear").out == f"there is no {path}: nothing to remove\n"
    put(cache)
    done = hasten("tune", "--clear")
    assert (done.code, done.out, done.err) == (0, f"removed {path}: 1 timed layer\n", "")
    assert not path.exists()
    put(cache)
    assert hasten("tune", "--clear", "--json").json == {"removed": [str(path)], "layers": 1}


def test_clear_removes_a_damaged_file_without_complaint(hasten, cache):
    path = cache / "tuning.json"
    cache.mkdir()
    path.write_text("{")
    done = hasten("tune", "--show")
    assert done.code == 0
    assert done.err == (
        f"hasten tune: warning: cannot read the measured times in {path}: it is not JSON (Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)); the roofline model chooses instead: remove the file "
        "with `hasten tune --clear`, and measure again\n"
    )
    done = hasten("tune", "--clear")
    assert (done.code, done.out, done.err) == (0, f"removed {path}: 0 timed layers\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "no source was given; name a model, or a layer as in conv:320-320@64x64,batch=2; --show shows what is kept",
        ),
        (["--show", "--clear"], "--show and --clear were given; give one of them"),
        (["sd15-unet", "--clear"], "--clear takes no source, and 'sd15-unet' was given"),
        ([SMALL, "--show"], f"--show takes no source, and '{SMALL}' was given"),
        ([SMALL, "--reduced"], "--reduced is for named models, and only layers were given"),
        (
            [SMALL, "sd15-unte"],
            "there is no file, directory or model 'sd15-unte'; `hasten models` lists the models. "
            "Did you mean 'sd15-unet'?",
        ),
        (["unet.onnx"], "source 'unet.onnx' is an ONNX file, and this verb takes a .pt2 file, a model"),
        (["--rounds", "0", SMALL], "argument --rounds: '0' is not a whole number from 1 up (hasten tune --help)"),
        (["conv:8-0@4x4"], "layer 'conv:8-0@4x4': outputs is '0', which is not a whole number from 1 up"),
    ],
)
def test_wrong_usage_is_one_line(hasten, cache, words, message):
    done = hasten("tune", *words)
    assert (done.code, done.out, done.err) == (2, "", f"hasten tune: {message}\n")
    assert not (cache / "tuning.json").exists()


def test_more_threads_than_processors(hasten):
    done = hasten("tune", "conv:64-64@32x32", "--threads", 4096)
    assert done.code == 2
    assert "--threads is 4096 and this process may use" in done.err
