"""``hasten bench``: words, workers, rows, tables. One test times something real; the other workers know no torch."""

import json
import os
import sys

import pytest

from hasten.errors import UsageError
from hasten.tools import bench_implementations as registry
from hasten.tools.bench_error import relative_error
from hasten.tools.bench_implementations import Implementation
from hasten.tools.bench_lines import markdown
from hasten.tools.bench_measure import in_turn
from hasten.tools.bench_row import Row, compare
from hasten.tools.bench_works import SETS, parse_layer, parse_work

LAYER = "group-norm-silu:32@4x4"
FAKES = """
import os, time
import numpy as np

right = np.arange(1.0, 9.0, dtype=np.float32)

def quick(subject, folder): return lambda: right
def slow(subject, folder): return lambda: time.sleep(0.01) or right
def wrong(subject, folder): return lambda: right * 1.01
def nan(subject, folder): return lambda: right * np.nan
def build(subject, folder): (folder / "built").write_text(subject.word)
def built(subject, folder): assert (folder / "built").read_text() == subject.word; return lambda: [right]
def refuses(subject, folder): raise ValueError("no kernel for it")
def hangs(subject, folder): time.sleep(60)
def talks(subject, folder): print("on stdout"); return lambda: right

def dies(subject, folder):
    calls = []
    def call():
        calls.append(0)
        if len(calls) > 4: os.abort()
        return right
    return call
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Implementations of a module that only the workers can import, as many as asked for, in the place of the real."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "fake_peers.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))

    def put(**made):
        entries = {n.replace("_", "-"): f"fake_peers:{function}" for n, function in made.items()}
        found = {n: Implementation(n, f, "fake_peers:build" if "built" in f else None) for n, f in entries.items()}
        monkeypatch.setattr(registry, "IMPLEMENTATIONS", found)
        monkeypatch.setattr("hasten.tools.bench_measure.IMPLEMENTATIONS", found)

    return put


def bench(hasten, *words):
    done = hasten("bench", LAYER, "--rounds", 3, "--warmup", 1, "--threads", 1, "-q", *words)
    return done, [line for line in done.err.splitlines() if "load average" not in line]


def test_layers_are_read():
    assert parse_layer("conv:320-640@64x48,batch=2") == (
        "conv",
        {"channels": 320, "outputs": 640, "height": 64, "width": 48, "batch": 2},
    )
    assert parse_work("group-norm-silu:128@8x8,groups=32,batch=1").word == "group-norm-silu:128@8x8"
    assert parse_work("geglu:320-1280@4096,batch=2").word == "geglu:320-1280@4096,batch=2"
    for word in SETS["layers"]:
        assert parse_work(word).word == word


def test_models_are_read_with_their_sizes():
    assert parse_work("sd15-unet", reduced=True).word == "sd15-unet-reduced"
    word = parse_work("sd15-vae-decoder@latent:1x4x32x32", shapes="latent:1x4x8x8").word
    assert word == "sd15-vae-decoder@latent:1x4x32x32"
    for named in (*SETS["models"], *SETS["large"]):
        assert parse_work(named).word == named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "no source was given; name a model, a layer as in conv:320-320@64x64,batch=2, or --set layers",
        ),
        (
            ["cnov:8-8@4x4"],
            "there is no layer 'cnov'; layers: conv, upsample-conv, group-norm-silu, geglu. Did you mean",
        ),
        (["conv:8@4x4"], "layer 'conv:8@4x4': '8@4x4' is not written as in conv:320-320@64x64,batch=2"),
        (["conv:8-8@4x4,bacth=2"], "layer 'conv:8-8@4x4,bacth=2': there is no 'bacth'; it takes batch. Did you mean"),
        (["conv:8-8@4x4,groups=2"], "layer 'conv:8-8@4x4,groups=2': there is no 'groups'; it takes batch."),
        (["conv:8-8@4x4,batch=0"], "layer 'conv:8-8@4x4,batch=0': batch is '0', which is not a whole number from 1 up"),
        (["conv:8-8@4x4,batch=1,batch=2"], "layer 'conv:8-8@4x4,batch=1,batch=2': batch is given twice"),
        (["group-norm-silu:48@4x4"], "layer 'group-norm-silu:48@4x4': 48 channels do not make 32 groups"),
        (["sd15-uent"], "there is no file, directory or model 'sd15-uent'; `hasten models` lists the models. Did you"),
        (["sd15-unet@"], "source 'sd15-unet@': there are no sizes after '@', as in sd15-vae-decoder@latent:1x4x32x32"),
        (["sd15-unet@sampel:2x4x8x8"], "shapes: sd15-unet has no input 'sampel'; inputs: sample, timestep,"),
        (["unet.onnx"], "source 'unet.onnx' is an ONNX file, and this verb takes a model"),
        ([LAYER, "--reduced"], "--reduced is for named models, and only layers were given"),
        ([LAYER, "--implementations", "eagre"], "argument --implementations: there is no implementation 'eagre';"),
        ([LAYER, "--implementations", "eager,eager"], "argument --implementations: implementation 'eager' is named"),
        ([LAYER, "--implementations", "eager", "--baseline", "inductor"], "--baseline 'inductor' is none of eager."),
        ([LAYER, "--set", "layer"], "argument --set: 'layer' is none of layers, models, large. Did you mean 'layers'?"),
        ([LAYER, "--into", "x.md"], "--into is for --render, which makes the tables of a file of JSON lines"),
        ([LAYER, "--render", "x.jsonl"], "--render makes tables of what was timed before, and takes no source"),
        ([LAYER, "--plot", "x.gif"], "output 'x.gif' must end in .png or .svg or .pdf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line(hasten, words, message):
    done = hasten("bench", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"hasten bench: {message}")
    assert done.err.count("\n") == 1


def test_more_threads_than_processors_are_refused(hasten, monkeypatch):
    monkeypatch.setattr("hasten.tools.bench_machine.cores", lambda: [0, 3])
    done = hasten("bench", LAYER, "--threads", 3)
    assert done.code == 2
    assert done.err.startswith("hasten bench: --threads is 3 and this process may use 2 processors; more threads than")


def test_a_missing_peer_is_named_or_refused(hasten, fakes, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = hasten("bench", LAYER, "--implementations", "eager,openvino")
    assert (done.code, done.out) == (4, "")
    assert done.err == "hasten bench: openvino is not installed: pip install 'hasten[openvino]'\n"
    fakes(eager="quick")
    missing = Implementation("openvino", "fake_peers:quick", packages=(("openvino", "openvino"),))
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "openvino", missing)
    done, errors = bench(hasten)
    assert (done.code, errors) == (0, [])
    assert "left out: openvino (openvino is not installed: pip install 'hasten[openvino]')" in done.out


def test_a_gpu_that_is_not_there_is_refused(hasten):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = hasten("bench", LAYER, "--implementations", "cuda-eager")
    assert (done.code, done.err) == (1, "hasten bench: cuda-eager needs an NVIDIA GPU, and torch finds none here\n")


def test_rows_and_lines(hasten, fakes, tmp_path):
    fakes(eager="slow", other="quick", hasten_engine="built", hasten_talks="talks")
    path = tmp_path / "bench.jsonl"
    done, errors = bench(hasten, "--jsonl", path, "--json")
    assert (done.code, errors) == (0, [])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == done.json["rows"]
    assert [line["implementation"] for line in lines] == ["eager", "other", "hasten-engine", "hasten-talks"]
    for line in lines:
        assert (line["work"], line["status"], line["reason"]) == (LAYER, "ok", "")
        assert (line["error"], line["reference"]) == (0.0, "eager")
        assert len(line["seconds"]["samples"]) == line["seconds"]["runs"] == 3
        assert line["seconds"]["p20"] <= line["seconds"]["median"] <= line["seconds"]["p80"]
        assert line["times_as_fast"]["baseline"] == "other"
        assert line["prepare_seconds"] > 0
        assert (line["threads"], line["dtype"], line["malloc"]) == (1, "float32", "keep")
        assert line["device"]
        assert {"hasten", "torch", "onnxruntime"} <= set(line["versions"])
        if sys.platform == "linux":
            assert 0 < line["peak_bytes"] <= line["peak_bytes_with_build"] < 200 << 20
            assert line["cpus"] == sorted(os.sched_getaffinity(0))[:1]
    slow, quick = lines[:2]
    assert slow["seconds"]["median"] >= 0.01
    assert slow["calls_per_sample"] == 1 < quick["calls_per_sample"]
    assert slow["times_as_fast"]["median"] < 1


def test_a_wrong_output_is_told_and_is_no_baseline(hasten, fakes):
    fakes(eager="slow", other="wrong", third="nan")
    done, errors = bench(hasten)
    assert done.code == 5
    assert errors == [
        f"hasten bench: other of {LAYER} is wrong: its outputs differ from eager's by 0.01 of the norm, above 0.001"
    ]
    assert "third: output 0 holds NaN or infinity" in done.out
    assert [line.split()[4] for line in done.out.splitlines() if line.startswith("eager ")] == ["baseline"]
    assert bench(hasten, "--implementations", "eager,other", "--rtol", "0.02")[0].code == 0


def test_the_reference_is_run_even_when_it_is_not_asked_for(hasten, fakes):
    fakes(eager="quick", other="wrong")
    done, _ = bench(hasten, "--implementations", "other", "--json")
    assert done.code == 5
    assert [row["implementation"] for row in done.json["rows"]] == ["other"]


def test_a_worker_that_fails_costs_its_own_row(hasten, fakes):
    fakes(eager="quick", dying="dies", refusing="refuses", hanging="hangs")
    done, errors = bench(hasten, "--timeout", 5, "--json")
    assert done.code == 1
    assert errors == [f"hasten bench: 3 of 4 gave no times: {', '.join(f'{n} of {LAYER}' for n in NAMES)}"]
    rows = {row["implementation"]: row for row in done.json["rows"]}
    assert rows["eager"]["status"] == "ok"
    assert rows["dying"]["reason"].startswith("the process was ended by signal 6 (SIGABRT) during '")
    assert rows["refusing"]["reason"] == "ValueError: no kernel for it"
    assert rows["hanging"]["reason"] == "no answer to 'prepare' within 5 s (--timeout)"
    assert all(rows[name]["seconds"] is None for name in NAMES)


NAMES = ("dying", "refusing", "hanging")


def test_without_a_reference_nothing_is_compared(hasten, fakes):
    fakes(eager="refuses", other="quick")
    done, _ = bench(hasten, "--implementations", "other", "--json")
    assert done.code == 1
    other, eager = done.json["rows"]
    assert (other["status"], other["error"], other["reference"]) == ("ok", None, "")
    assert (eager["implementation"], eager["status"]) == ("eager", "failed")


def test_a_real_run(hasten, tmp_path):
    """GroupNorm and SiLU in eager, with Inductor behind our backend, and as an engine of ONNX Runtime."""
    names = ("eager", "hasten-inductor", "hasten-onnxruntime")
    done, errors = bench(hasten, "--implementations", ",".join(names), "--baseline", "eager", "--json")
    assert (done.code, errors) == (0, [])
    assert [row["implementation"] for row in done.json["rows"]] == list(names)
    for row in done.json["rows"]:
        assert row["error"] < 1e-5
        assert row["times_as_fast"]["baseline"] == "eager"


def line(work, name, seconds, **more):
    timed = {"median": seconds, "p20": seconds, "p80": seconds}
    ratio = {"baseline": "eager", "median": 2e-3 / seconds, "p20": 1.0, "p80": 2.0}
    return {
        "work": work,
        "implementation": name,
        "status": "ok",
        "reason": "",
        "seconds": timed,
        "times_as_fast": ratio,
        "peak_bytes": 50 << 20,
        "peak_bytes_with_build": 100 << 20,
        "threads": 2,
        "device": "Some CPU",
        "dtype": "float32",
        "malloc": "keep",
        "date": "2026-01-02T00:00:00",
        "versions": {"torch": "2.13.0"},
        **more,
    }


LINES = [
    line("conv:8-8@4x4", "eager", 9e-3),
    line("conv:8-8@4x4", "eager", 2e-3),
    line("conv:8-8@4x4", "hasten-aoti", 1e-3),
    line("conv:8-8@4x4", "other", 1e-4, status="wrong", reason="it is off"),
    line("sd15-unet", "eager", 2.5, date="2026-01-03T00:00:00", environment={"OMP_WAIT_POLICY": "passive"}),
    {**line("sd15-unet", "other", 1.0, status="failed", reason="it died"), "seconds": None},
]


def test_tables_hold_the_latest_line_of_each():
    text = markdown(LINES)
    assert text.startswith(
        "Some CPU, 2 threads, float32, allocator keeps its pages, OMP_WAIT_POLICY=passive, 2026-01-02 to 2026-01-03; "
        "torch 2.13.0.\n"
    )
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert tables[0] == [
        "| work | eager | hasten-aoti | other |",
        "| --- | --- | --- | --- |",
        "| conv:8-8@4x4 | 2.00 | **1.00** | 0.100 (wrong) |",
        "| sd15-unet | **2500** |  | failed |",
    ]
    assert tables[1][2] == "| conv:8-8@4x4 | baseline | 2.00 (1.00 to 2.00) | 20.00 (1.00 to 2.00) |"
    assert tables[2][2] == "| conv:8-8@4x4 | 50 (100) | 50 (100) | 50 (100) |"
    assert text.endswith("- other of conv:8-8@4x4: it is off\n- other of sd15-unet: it died")


def test_render_writes_between_the_marks(hasten, tmp_path):
    path, page = tmp_path / "bench.jsonl", tmp_path / "page.md"
    path.write_text("".join(json.dumps(x) + "\n" for x in LINES))
    assert hasten("bench", "--render", path).out.rstrip() == markdown(LINES)
    page.write_text("# Page\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nend\n")
    for _ in range(2):
        done = hasten("bench", "--render", path, "--into", page)
        assert (done.code, done.out) == (0, f"wrote {page}\n")
        assert page.read_text() == f"# Page\n\n<!-- bench -->\n{markdown(LINES)}\n<!-- /bench -->\n\nend\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.jsonl", "page.md"]


def test_plot(hasten, tmp_path):
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "bench.jsonl", tmp_path / "bench.png"
    path.write_text("".join(json.dumps(x) + "\n" for x in LINES))
    done = hasten("bench", "--render", path, "--plot", plot)
    assert (done.code, done.out) == (0, f"wrote {plot}\n")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_timed(hasten, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = hasten("bench", LAYER, "--plot", tmp_path / "bench.png")
    assert (done.code, done.out) == (4, "")
    assert done.err == "hasten bench: matplotlib is not installed: pip install 'hasten[bench]'\n"


def test_render_refuses_what_it_cannot_use(hasten, tmp_path):
    path, page = tmp_path / "bench.jsonl", tmp_path / "page.md"
    page.write_text("no marks")
    for text, message in (
        ("", f"{path} has no lines; `hasten bench SOURCE --jsonl {path}` writes some"),
        ("{", f"{path}, line 1: it is not JSON (Expecting property name enclosed in double quotes)"),
        ('\n{"work": 1}\n', f"{path}, line 2: there is no implementation; `hasten bench --jsonl` writes such lines"),
        (
            json.dumps(LINES[0]),
            f"{page} has no line <!-- bench --> with <!-- /bench --> after it; write both where the",
        ),
    ):
        path.write_text(text)
        done = hasten("bench", "--render", path, "--into", page)
        assert done.code == 2
        assert done.err.startswith(f"hasten bench: {message}")
    assert page.read_text() == "no marks"
    assert hasten("bench", "--render", tmp_path / "none").code == 2


def test_everyone_takes_every_place_in_turn():
    orders = [list(in_turn("abc", turn)) for turn in range(6)]
    assert orders[:2] == [["a", "b", "c"], ["a", "c", "b"]]
    assert {tuple(order) for order in orders} == {(*p,) for p in ("abc", "acb", "bca", "bac", "cab", "cba")}


def test_ratios_are_of_rounds_and_baselines_of_others():
    rows = [Row("w", Implementation(n, ""), samples=s) for n, s in (("hasten-a", [1.0, 2.0]), ("eager", [2.0, 6.0]))]
    compare(rows, None)
    assert (rows[0].baseline, rows[0].ratios) == ("eager", (2.0, 3.0))
    compare(rows[:1], None)
    assert (rows[0].baseline, rows[0].ratios) == ("hasten-a", (1.0, 1.0))


def test_errors_of_outputs(tmp_path):
    import numpy as np

    def saved(name, *values):
        np.save(tmp_path / name, np.array(values, np.float32))
        return str(tmp_path / f"{name}.npy")

    a, b, zero, short = saved("a", 3, 4), saved("b", 3, 5), saved("zero", 0, 0), saved("short", 1)
    assert relative_error([a, zero], [b, zero]) == (0.2, "")
    assert relative_error([a], [short]) == (None, "output 0 has shape (1,) instead of (2,)")
    assert relative_error([zero], [a]) == (None, "output 0 should be zero everywhere and is not")
    assert relative_error([a], [a, b]) == (None, "it gives 2 outputs instead of 1")
    nan = saved("nan", 3, float("nan"))
    assert relative_error([a], [nan]) == (None, "output 0 holds NaN or infinity")
    assert relative_error([a, nan], [b, a]) == (None, "output 1 of the reference holds NaN or infinity")


def test_names_of_implementations():
    with pytest.raises(UsageError, match="Did you mean 'inductor-max-autotune'"):
        registry.parse_names("inductor-maxautotune")
    ours = {made.name for made in registry.IMPLEMENTATIONS.values() if made.ours}
    assert ours == {n for n in registry.IMPLEMENTATIONS if "hasten" in n}
