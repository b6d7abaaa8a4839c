"""Graphs before and after, as text: every ``tests/golden/*.onnxtxt`` holds its RUN line and what must come out."""

import argparse
import shlex
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts

from hasten.backends.optimize import run_pipeline
from hasten.backends.target import parse_target
from hasten.passes.onnx import io
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.onnx.site_check import SiteCheck
from hasten.passes.rule import Report

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("*.onnxtxt"))


def options_of(path):
    line = path.read_text().splitlines()[0]
    assert line.startswith("# RUN: ")
    parser = argparse.ArgumentParser()
    parser.add_argument("-p", "--passes", required=True)
    parser.add_argument("--target", default="onnxruntime:cpu")
    return parser.parse_args(shlex.split(line.removeprefix("# RUN: ")))


def optimise(path):
    """The report's hits and misses as comment lines, then the graph."""
    options = options_of(path)
    graph, report = OnnxGraph(io.read(path).model), Report()
    target = parse_target(options.target)
    run_pipeline(
        graph, "onnx", target, report, passes=options.passes, fuel=None, skip=(), verify=SiteCheck(), dump=None
    )
    lines = []
    for rule in report.rules:
        assert not rule.reverted
        variants = sorted({s.variant for s in rule.sites if s.variant}) if rule.name != "legalise" else []
        lines.append(f"# {rule.name}: {rule.hits}" + (f" ({', '.join(variants)})" if variants else ""))
        if rule.name != "legalise":
            lines += [f"# {rule.name} misses {m.where}: {m.reason}" for m in rule.misses]
    return "\n".join(lines) + "\n" + graph.text(), graph


def matches(path, text):
    options = Options(match_filename=str(path))
    with path.open() as file:
        parser = Parser(options, file, *pattern_for_opts(options))
        return Matcher(options, FInput("output", text), parser).run() == 0


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path):
    text, _ = optimise(path)
    assert matches(path, text), text


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_a_second_run_changes_nothing(path):
    _, graph = optimise(path)
    again = OnnxGraph(graph.to_model(infos=False))
    report = Report()
    options = options_of(path)
    target = parse_target(options.target)
    run_pipeline(again, "onnx", target, report, passes=options.passes, fuel=None, skip=(), verify=None, dump=None)
    assert {r.name: r.hits for r in report.rules if r.hits} == {}
    assert again.text() == graph.text()


def test_a_wrong_check_fails(tmp_path):
    path = tmp_path / "wrong.onnxtxt"
    path.write_text("# CHECK: out = Tanh (x)\n")
    assert not matches(path, "out = Relu (x)\n")


def test_there_are_goldens():
    assert len(GOLDEN) >= 10
