"""``inspect``, ``optimize`` and ``build``: the schema, the files, expectations, and rewrites that do not verify."""

import dataclasses
import re

import onnx
import onnxruntime
import pytest
import torch

from hasten.passes.rules.group_norm_act import GROUP_NORM_ACT
from hasten.tools.source import load_program

SCHEMA = {"source", "ir", "target", "rules", "ops_before", "ops_after", "flops", "bytes", "seconds", "outputs"}


def check_schema(document, *, source, ir, target, outputs):
    assert document.keys() >= SCHEMA
    assert (document["source"], document["ir"], document["target"]) == (str(source), ir, target)
    assert document["outputs"] == [str(o) for o in outputs]
    for rule in document["rules"]:
        assert rule["hits"] == len(rule["sites"])
        assert all(miss.keys() == {"site", "reason"} for miss in rule["misses"])
    for counts in (document["ops_before"], document["ops_after"]):
        assert counts
        assert all(isinstance(n, int) for n in counts.values())


def hits(document):
    return {rule["name"]: rule["hits"] for rule in document["rules"] if rule["hits"]}


def test_inspect_onnx(hasten, onnx_file, tmp_path):
    page = tmp_path / "page.html"
    document = hasten("inspect", onnx_file, "--json", "--html", page, "--shapes", "x:2x32x8x8").json
    check_schema(document, source=onnx_file, ir="onnx", target="onnxruntime:cpu", outputs=[page])
    assert hits(document)["group-norm-act"] == 1
    assert document["flops"] == 2 * (2 * 32 * 8 * 8) * 32 * 9
    assert document["weight_bytes"] == 4 * (32 + 32 + 32 * 32 * 9)
    assert document["ops_before"] == {"Conv": 1, "GroupNormalization": 1, "Mul": 1, "Sigmoid": 1}
    assert not any("symbolic" in note for note in document["notes"])


def test_the_page_needs_no_network_and_escapes_names(hasten, tmp_path, tiny_onnx):
    model = tiny_onnx(second_output=True)
    model.graph.node[0].name = "<script>alert(1)</script>"
    source, page = tmp_path / "a&b.onnx", tmp_path / "page.html"
    onnx.save(model, source)
    assert hasten("inspect", source, "--html", page).code == 0
    text = page.read_text()
    assert "a&amp;b.onnx" in text
    assert "<script" not in text
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", text)
    assert "has a user outside the pattern" in text


def test_inspect_shows_a_near_miss_with_its_reason(hasten, tmp_path, tiny_onnx):
    source = tmp_path / "model.onnx"
    onnx.save(tiny_onnx(second_output=True), source)
    document = hasten("inspect", source, "--json").json
    misses = next(r["misses"] for r in document["rules"] if r["name"] == "group-norm-act")
    assert any("has a user outside the pattern" in miss["reason"] for miss in misses)
    shown = hasten("inspect", source).out
    assert "has a user outside the pattern" in shown
    assert "--shapes gives them values" in shown


def test_inspect_pt2(hasten, pt2_file):
    document = hasten("inspect", pt2_file, "--json").json
    check_schema(document, source=pt2_file, ir="fx", target="inductor:cpu", outputs=[])
    assert hits(document) == {"attention": 1, "group-norm-act": 1, "native-attention": 1}
    conv, linear, attention = 2 * 32 * 64 * 4 * 9, 2 * 64 * 96 * 32, 2 * 2 * 64 * 64 * 32
    assert document["flops"] == 2 * (conv + linear + attention)
    assert [t["name"] for t in document["inputs"]] == ["sample"]


def test_inspect_engine_shows_what_its_build_reported(hasten, engine, onnx_file):
    document = hasten("inspect", engine, "--json").json
    assert document["target"] == "onnxruntime:cpu"
    assert hits(document)["group-norm-act"] == 1


def test_inspect_writes_nothing(hasten, onnx_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hasten("inspect", onnx_file).code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "optimize", "build"])
def test_an_expectation_that_is_not_met_is_exit_3_with_the_nearest_misses(hasten, tmp_path, verb, tiny_onnx):
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(tiny_onnx(second_output=True), source)
    words = [] if verb == "inspect" else ["-o", out]
    done = hasten(verb, source, *words, "--expect", "group-norm-act.silu=1")
    assert done.code == 3
    last = done.err.splitlines()[-1]
    assert last.startswith(f"hasten {verb}: group-norm-act.silu: 1 expected, 0 found (nearest misses: ")
    assert "has a user outside the pattern" in last
    assert not out.exists()


def test_an_expectation_that_is_met(hasten, onnx_file):
    assert hasten("inspect", onnx_file, "--expect", "group-norm-act.silu=1,attention=0").code == 0


def test_optimize_onnx_writes_a_model_that_computes_the_same(hasten, onnx_file, tmp_path):
    out, dump = tmp_path / "fast.onnx", tmp_path / "dump"
    document = hasten("optimize", onnx_file, "-o", out, "--json", "--verify", "model", "--dump", dump).json
    check_schema(document, source=onnx_file, ir="onnx", target="onnxruntime:cpu", outputs=[out])
    dumped = sorted(p.name for p in dump.iterdir())
    assert dumped[0] == "00-input.txt"
    assert "05-group-norm-act.txt" in dumped
    x = torch.randn(3, 32, 8, 8).numpy()
    results = [onnxruntime.InferenceSession(str(p)).run(None, {"x": x})[0] for p in (onnx_file, out)]
    torch.testing.assert_close(*map(torch.from_numpy, results), rtol=1e-4, atol=1e-5)
    assert hasten("compare", onnx_file, out, "--repeat", 1).code == 0


def test_optimize_keeps_fused_operators_for_another_target(hasten, onnx_file, tmp_path):
    out = tmp_path / "fast.onnx"
    assert hasten("optimize", onnx_file, "-o", out, "--passes", "canonical,group-norm-act").code == 0
    model = onnx.load(out)
    assert [n.op_type for n in model.graph.node] == ["GroupNormAct", "Conv"]
    assert [f.name for f in model.functions] == ["GroupNormAct"]


def test_optimize_saves_external_data(hasten, onnx_file, tmp_path):
    out = tmp_path / "fast.onnx"
    document = hasten("optimize", onnx_file, "-o", out, "--save-external-data", "--json").json
    assert document["outputs"] == [str(out), f"{out}.data"]
    assert out.stat().st_size < 8000
    assert (tmp_path / "fast.onnx.data").stat().st_size >= 4 * 32 * 32 * 9


def test_optimize_pt2_keeps_names_sizes_and_fused_operators(hasten, pt2_file, tmp_path):
    out = tmp_path / "fast.pt2"
    done = hasten("optimize", pt2_file, "-o", out, "--verify", "model", "--expect", "attention=1,group-norm-act.silu=1")
    assert done.code == 0
    assert "note: import hasten.passes.ops before torch.export.load reads the file" in done.out
    before, after = load_program(pt2_file), load_program(out)
    names = {str(n.target) for n in after.graph.nodes}
    assert {"hasten.flash_attention.default", "hasten.group_norm_act.default"} <= names
    assert list(map(str, after.range_constraints.values())) == list(map(str, before.range_constraints.values()))
    for batch in (1, 2, 8):
        x = torch.randn(batch, 4, 8, 8)
        torch.testing.assert_close(after.module()(x), before.module()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "left"),
    [(["--fuel", "0"], set()), (["--fuel", "1"], {"attention"}), (["--skip", "attention"], {"group-norm-act"})],
)
def test_fuel_and_skip(hasten, pt2_file, options, left):
    assert hits(hasten("inspect", pt2_file, "--json", *options).json).keys() == left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{onnx}", "-o", "{tmp}/x.pt2"], "output '{tmp}/x.pt2' must end in .onnx"),
        (["{pt2}", "-o", "{tmp}/x.onnx"], "output '{tmp}/x.onnx' must end in .pt2"),
        (["{onnx}", "-o", "{onnx}"], "output '{onnx}' is the source itself; choose another name"),
        (
            ["{onnx}", "-o", "{tmp}/no/x.onnx"],
            "cannot write {tmp}/no/x.onnx: there is no folder {tmp}/no; create it first",
        ),
        (
            ["{pt2}", "-o", "{tmp}/x.pt2", "--save-external-data"],
            "--save-external-data is for ONNX files; '{pt2}' is a .pt2 file",
        ),
        (
            ["{onnx}", "-o", "{tmp}/x.onnx", "--dtype", "float16"],
            "--dtype is for named models; an ONNX file has its dtypes already",
        ),
        (
            ["{pt2}", "-o", "{tmp}/x.pt2", "--dtype", "float16"],
            "--dtype: {pt2} has its dtypes already; convert the module and export it again",
        ),
    ],
)
def test_optimize_refuses_before_it_works(hasten, onnx_file, pt2_file, tmp_path, words, message):
    names = {"onnx": onnx_file, "pt2": pt2_file, "tmp": tmp_path}
    done = hasten("optimize", *(w.format(**names) for w in words))
    assert (done.code, done.out) == (2, "")
    assert done.err == f"hasten optimize: {message.format(**names)}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wrong_rule(monkeypatch):
    """The group-norm-act rule with a replacement that doubles the result."""

    def wrong(view, found, root):
        right = GROUP_NORM_ACT.replace(view, found, root)
        return view.emit("add", [right, right], {}, at=root)

    rule = dataclasses.replace(GROUP_NORM_ACT, replace=wrong)
    monkeypatch.setattr("hasten.passes.rules.group_norm_act.GROUP_NORM_ACT", rule)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_rewrite_that_is_wrong_is_taken_back_and_named(hasten, onnx_file, pt2_file, tmp_path, wrong_rule, kind):
    source, out = {"onnx": onnx_file, "pt2": pt2_file}[kind], tmp_path / f"out.{kind}"
    done = hasten("optimize", source, "-o", out, "--json")
    assert done.code == 0
    rule = next(r for r in done.json["rules"] if r["name"] == "group-norm-act")
    assert rule["hits"] == 0
    with_silu, alone = sorted(rule["reverted"], key=lambda site: site["site"] == "norm" or "group" in site["site"])
    for site in (with_silu, alone):
        assert re.fullmatch(r"the result differs by [\d.e+-]+ where values reach [\d.e+-]+", site["reason"])
        assert f"hasten optimize: warning: group-norm-act at {site['site']} was taken back: " in done.err
    assert hasten("compare", source, out, "--repeat", 1).code == 0


@pytest.mark.parametrize("verb", ["inspect", "optimize", "build"])
def test_a_rewrite_that_is_wrong_is_exit_5_with_strict(hasten, onnx_file, tmp_path, wrong_rule, verb):
    out = tmp_path / "out.onnx"
    words = [] if verb == "inspect" else ["-o", out]
    done = hasten(verb, onnx_file, *words, "--strict", "-q")
    assert (done.code, done.out) == (5, "")
    assert re.fullmatch(
        rf"hasten {verb}: group-norm-act at \S+: the result differs by \S+ where values reach \S+ \(1 more\); the site "
        r"was left as it was: run without --strict, or with --skip group-norm-act\n",
        done.err,
    )
    assert not out.exists()


def test_verify_model_finds_what_sites_cannot(hasten, onnx_file, tmp_path, wrong_rule):
    out = tmp_path / "out.onnx"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # every site passes
        patch.setattr("hasten.passes.onnx.site_check.SiteCheck.__call__", lambda *_: None)
        done = hasten("optimize", onnx_file, "-o", out, "--verify", "model")
    assert done.code == 5
    assert done.err.startswith(
        f"hasten optimize: the rewritten model differs from {onnx_file} on random inputs (seed 0): "
    )
    assert not out.exists()


def test_build_and_what_it_says(hasten, onnx_file, tmp_path):
    out = tmp_path / "engine"
    document = hasten("build", onnx_file, "-o", out, "--shapes", "x:2x32x8x8", "--json").json
    check_schema(document, source=onnx_file, ir="onnx", target="onnxruntime:cpu", outputs=[out])
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": [2, 32, 8, 8]}]
    assert document["engine"]["bytes"] > 0
    again = hasten("build", onnx_file, "-o", out)
    assert again.code == 2
    assert again.err == (f"hasten build: output '{out}' is an engine already; --force (overwrite=True) replaces it\n")
    assert hasten("build", onnx_file, "-o", out, "--force").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--shapes", "x:2x32x8x8;"],
            "shapes 'x:2x32x8x8;': expected ',' at position 11, found ';'; "
            "write x:1x4x64x64,t:1 or x:[1,4,64,64],t:[1]",
        ),
        (["--shapes", "y:2x32x8x8"], "shapes: there is no input 'y'; inputs: x."),
        (["--shapes", "x:2x32x8"], "shapes: input 'x' has 4 dimensions (B, 32, 8, 8), 3 given"),
        (["--shapes", "x:2x31x8x8"], "shapes: input 'x', dimension 1 is fixed to 32, 31 given"),
        (
            ["--min-shapes", "x:1x32x8x8"],
            "--opt-shapes is missing; a range needs --min-shapes, --opt-shapes and --max-shapes",
        ),
        (
            ["--shapes", "x:1x32x8x8", "--max-shapes", "x:1x32x8x8"],
            "--shapes fixes the sizes; leave out --min-shapes, --opt-shapes and --max-shapes, or it",
        ),
        (
            ["--target", "aoti:cpu"],
            "target aoti:cpu is built from PyTorch, and nothing here turns an ONNX model into a PyTorch graph; build "
            "the ONNX model for onnxruntime:cpu, or give the module",
        ),
    ],
)
def test_build_refuses(hasten, onnx_file, tmp_path, words, message):
    done = hasten("build", onnx_file, "-o", tmp_path / "engine", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"hasten build: {message}\n"
    assert not (tmp_path / "engine").exists()


def test_a_missing_optional_package_is_exit_4_with_the_command(hasten, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    done = hasten("build", onnx_file, "-o", tmp_path / "engine", "--target", "tensorrt-rtx:sm89")
    assert (done.code, done.out) == (4, "")
    assert done.err == "hasten build: tensorrt_rtx is not installed: pip install 'hasten[tensorrt-rtx]'\n"
    assert not (tmp_path / "engine").exists()
