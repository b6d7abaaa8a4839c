"""What every verb shares: help, usage errors, --json, exit codes, unexpected ends."""

import json
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from hasten.tools import cli

VERBS = tuple(cli.VERBS)


def test_help_lists_every_verb_and_nothing_else(hasten):
    done = hasten("--help")
    assert done.code == 0
    listed = done.out.partition("verbs:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == list(VERBS)
    for later in ("calibrate", "reduce"):
        assert later not in listed


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_examples_that_its_own_parser_reads(hasten, verb):
    done = hasten(verb, "--help")
    assert done.code == 0
    command = import_module(f"hasten.tools.{verb}")
    assert 2 <= len(command.EXAMPLES) <= 3
    for example in command.EXAMPLES:
        assert example in done.out
        program, named, *words = shlex.split(example)
        assert (program, named) == ("hasten", verb)
        parser = cli.Parser(prog="x", allow_abbrev=False)
        command.configure(parser)
        cli.output_options(parser)
        parser.parse_args(words)


@pytest.mark.parametrize("words", [["--help"], ["models", "--help"], ["optimize", "--help"], ["generate", "--help"]])
def test_help_imports_no_torch(words):
    script = f"import sys; from hasten.tools.cli import main; main({words!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_version(hasten):
    assert hasten("--version").out == "hasten 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optimise"],
            "hasten: there is no verb 'optimise'; verbs: models, inspect, optimize, build, run, generate, compare, "
            "calibrate, tune, bench, doctor. Did you mean 'optimize'?",
        ),
        (["--vresion"], "hasten: there is no option '--vresion'. Did you mean '--version'?"),
        (
            ["inspect", "x.onnx", "--jsn"],
            "hasten inspect: there is no option '--jsn'. Did you mean '--json'? (hasten inspect --help)",
        ),
        (["models", "extra"], "hasten models: there is one word too many: 'extra' (hasten models --help)"),
        (
            ["optimize", "x.onnx"],
            "hasten optimize: the following arguments are required: -o/--output (hasten optimize --help)",
        ),
        (
            ["optimize", "x.onnx", "-o", "y.onnx", "--verify", "site"],
            "hasten optimize: argument --verify: 'site' is none of structure, sites, model. Did you mean 'sites'? "
            "(hasten optimize --help)",
        ),
        (
            ["inspect", "x.onnx", "--expect", "atention=3"],
            "hasten inspect: argument --expect: there is no rule 'atention'; rules: gelu, geglu, attention, "
            "group-norm-act, fold-conv, upsample-conv, winograd-conv2d, native-group-norm, native-attention. "
            "Did you mean 'attention'? (hasten inspect --help)",
        ),
        (
            ["inspect", "x.onnx", "--expect", "attention"],
            "hasten inspect: argument --expect: 'attention' is not written RULE=NUMBER, as in attention=32 "
            "(hasten inspect --help)",
        ),
        (
            ["inspect", "x.onnx", "--skip", "gleu"],
            "hasten inspect: argument --skip: there is no pass 'gleu'; passes: canonical, gelu, geglu, attention, "
            "group-norm-act, fold-conv, upsample-conv, winograd-conv2d, native-group-norm, native-attention, legalise. "
            "Did you mean 'gelu'? (hasten inspect --help)",
        ),
        (
            ["inspect", "x.onnx", "--passes", "gelu;attention"],
            "hasten inspect: argument --passes: expected ',' before ';attention' in 'gelu;attention' "
            "(hasten inspect --help)",
        ),
        (
            ["inspect", "x.onnx", "--fuel", "-1"],
            "hasten inspect: argument --fuel: '-1' is not a whole number from 0 up (hasten inspect --help)",
        ),
        (
            ["build", "x.onnx", "-o", "y", "--target", "onnxruntim:cpu"],
            "hasten build: argument --target: there is no backend 'onnxruntim'; backends: inductor, aoti, onnxruntime, "
            "tensorrt, tensorrt-rtx, torch-tensorrt. Did you mean 'onnxruntime'? (hasten build --help)",
        ),
        (
            ["compare", "a.onnx", "b.onnx", "--rtol", "nan"],
            "hasten compare: argument --rtol: 'nan' is not a number from 0 up (hasten compare --help)",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_with_the_nearest_word(hasten, words, message):
    done = hasten(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err == message + "\n"


def test_no_verb_shows_the_help(hasten):
    done = hasten()
    assert done.code == 2
    assert done.err.endswith("hasten: no verb given; `hasten --help` lists the verbs\n")
    assert "verbs:" in done.err


def test_an_unexpected_error_is_one_line_and_v_adds_the_traceback(hasten, monkeypatch):
    def broken(args, console):
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("hasten.tools.doctor.run", broken)
    done = hasten("doctor")
    assert (done.code, done.out) == (1, "")
    assert done.err == "hasten doctor: unexpected ZeroDivisionError: first second; -v shows the traceback\n"
    assert "Traceback (most recent call last)" in hasten("doctor", "-v").err


def test_an_interruption_is_130(hasten, monkeypatch):
    def interrupted(args, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.tools.doctor.run", interrupted)
    done = hasten("doctor")
    assert (done.code, done.err) == (130, "hasten doctor: interrupted\n")


def test_what_libraries_print_stays_off_stdout_with_json(hasten, monkeypatch):
    def noisy(args, console):
        print("from a library")
        console.document({"answer": 42})
        return 0

    monkeypatch.setattr("hasten.tools.doctor.run", noisy)
    done = hasten("doctor", "--json")
    assert json.loads(done.out) == {"answer": 42}
    assert done.err == "from a library\n"


def test_an_error_is_the_json_document_too(hasten):
    done = hasten("inspect", "nothing.onnx", "--json")
    assert done.code == 2
    message = "cannot read nothing.onnx: there is no such file; give the path of an .onnx file"
    assert done.json == {"error": message, "exit_code": 2}
    assert done.err == f"hasten inspect: {message}\n"


def test_progress_says_nothing_before_two_seconds_and_then_plain_lines(capsys, monkeypatch):
    import time

    from hasten.tools import console as module

    console = module.Console("build")
    with console.progress("quick") as tell:
        tell("compile", 0.5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with console.progress("slow") as tell:
        tell("compile", 0.5)
        time.sleep(0.3)
        tell("write", 0.9)
    assert capsys.readouterr().err == "hasten build: slow: compile (50%)\nhasten build: slow: write (90%)\n"
    with module.Console("build", verbosity=-1).progress("quiet"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
