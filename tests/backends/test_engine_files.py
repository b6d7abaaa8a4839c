"""What `load` refuses, and how engine directories come to be."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hasten.backends.directory import publish
from hasten.backends.engine import load
from hasten.backends.manifest import Manifest, TensorSpec, read_manifest, write_manifest
from hasten.errors import HastenError, UsageError


def fill(folder: Path, content: bytes = b"plan") -> None:
    (folder / "model.plan").write_bytes(content)
    spec = TensorSpec("x", "float32", ("b", 4))
    write_manifest(
        folder,
        Manifest(
            target="tensorrt-rtx:sm89",
            artifact="model.plan",
            inputs=(spec,),
            outputs=(spec,),
            versions={"hasten": "0.1.0"},
            report={"rules": []},
            seconds=1.5,
            dims={"b": (1, 8)},
            constants={"flag": None, "scale": 2.0},
        ),
    )


@pytest.fixture
def engine(tmp_path):
    with publish(tmp_path / "unet") as folder:
        fill(folder)
    return tmp_path / "unet"


def edit(engine: Path, **changes) -> None:
    content = json.loads((engine / "manifest.json").read_text())
    (engine / "manifest.json").write_text(json.dumps({**content, **changes}))


def test_manifest_reads_back(engine):
    manifest = read_manifest(engine)
    assert manifest.inputs == manifest.outputs == (TensorSpec("x", "float32", ("b", 4)),)
    assert manifest.dims == {"b": (1, 8)}
    assert manifest.constants == {"flag": None, "scale": 2.0}
    assert manifest.state == ()
    assert manifest.files["model.plan"][1] == 4
    assert manifest.files["model.plan"][0] == hashlib.sha256(b"plan").hexdigest()
    assert json.loads((engine / "manifest.json").read_text())["format"] == "hasten-engine"


def refusal(engine: Path) -> str:
    with pytest.raises(HastenError) as caught:
        load(engine)
    assert caught.value.exit_code == 1
    text = str(caught.value)
    prefix = f"engine '{engine}': "
    assert text.startswith(prefix)
    return text.removeprefix(prefix)


def test_refuses_a_missing_directory(tmp_path):
    assert refusal(tmp_path / "none") == "there is no such directory"


def test_refuses_a_directory_without_a_manifest(tmp_path):
    assert refusal(tmp_path) == "manifest.json is missing, so this is no engine directory"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "{",
            "manifest.json is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        ("[" * 100_000, "manifest.json is not JSON (maximum recursion depth exceeded"),
        ("\udcff", "manifest.json is not JSON ("),
        ("[]", "manifest.json holds a JSON list, not an object"),
        ("{}", "manifest.json has format None, not 'hasten-engine'"),
        ('{"format": "onnx"}', "manifest.json has format 'onnx', not 'hasten-engine'"),
        (
            '{"format": "hasten-engine", "format_version": 3}',
            "manifest.json has format version 3 and this hasten reads 2: build the engine again",
        ),
        (
            '{"format": "hasten-engine", "format_version": 2, "target": "aoti:cpu", "artifact": "m"}',
            "manifest.json lacks 'inputs', 'outputs', 'dims', 'constants', 'state', 'versions', 'report', 'audit', "
            "'cache', 'seconds', 'files'",
        ),
    ],
)
def test_refuses_a_foreign_manifest(engine, text, reason):
    (engine / "manifest.json").write_text(text, errors="surrogateescape")
    assert refusal(engine).startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": 3}, "manifest.json is malformed (TypeError: 3 is no str)"),
        ({"inputs": {}}, "manifest.json is malformed (TypeError: {} is no list)"),
        ({"inputs": [{"name": "x"}]}, "manifest.json is malformed (KeyError: 'shape')"),
        (
            {"inputs": [{"name": "x", "dtype": "a", "shape": [True]}]},
            "manifest.json is malformed (TypeError: True is no int)",
        ),
        (
            {"dims": {"b": [1]}},
            "manifest.json is malformed (ValueError: not enough values to unpack (expected 2, got 1))",
        ),
        ({"files": {"model.plan": {"size": 1}}}, "manifest.json is malformed (KeyError: 'sha256')"),
        ({"artifact": "other"}, "manifest.json names the artifact 'other', which is not among its files"),
    ],
)
def test_refuses_a_malformed_manifest(engine, changes, reason):
    edit(engine, **changes)
    assert refusal(engine) == reason


@pytest.mark.parametrize(
    "name", ["../evil.so", "/etc/passwd", "sub/model.plan", "..", "", "C:\\x", "a\\b", "a\0b", "manifest.json"]
)
def test_refuses_file_names_that_leave_the_directory(engine, name):
    entry = json.loads((engine / "manifest.json").read_text())["files"]["model.plan"]
    edit(engine, files={"model.plan": entry, name: entry})
    assert refusal(engine) == f"manifest.json names the file {name!r}, which is no plain name inside the directory"


def test_refuses_links(engine, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"plan")
    (engine / "model.plan").unlink()
    (engine / "model.plan").symlink_to(tmp_path / "elsewhere")
    assert refusal(engine) == "'model.plan' is a link; an engine holds plain files"
    (engine / "manifest.json").rename(tmp_path / "manifest.json")
    (engine / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert refusal(engine) == "manifest.json is a link; an engine holds plain files"


def test_refuses_changed_bytes(engine):
    (engine / "model.plan").write_bytes(b"plam")
    assert (
        refusal(engine)
        == "'model.plan' has changed since the engine was built (its sha256 differs): build the engine again"
    )
    (engine / "model.plan").write_bytes(b"longer")
    assert refusal(engine) == "'model.plan' has 6 bytes instead of 4: build the engine again"


def test_refuses_a_missing_file(engine):
    (engine / "model.plan").unlink()
    assert refusal(engine) == "'model.plan' is missing: build the engine again"


def test_refuses_a_file_that_the_manifest_does_not_list(engine):
    (engine / "weights.pkl").write_bytes(b"")
    assert (
        refusal(engine) == "holds 'weights.pkl', which its manifest does not list: remove it or build the engine again"
    )


def test_refuses_a_target_it_does_not_know(engine):
    edit(engine, target="abacus:wood")
    with pytest.raises(UsageError, match=r"^target 'abacus:wood': there is no backend 'abacus'; "):
        load(engine)


def test_gpu_engine_loads_without_a_gpu_and_says_so_when_called(engine, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    loaded = load(engine)
    assert repr(loaded) == "Engine('unet', tensorrt-rtx:sm89, x: float32(b, 4) -> x: float32(b, 4))"
    with pytest.raises(HastenError) as caught:
        loaded(x=None)
    assert str(caught.value) == "engine 'unet' (tensorrt-rtx:sm89) needs an NVIDIA GPU, and torch finds none here"


def test_threads_are_an_option_of_onnxruntime(engine):
    with pytest.raises(UsageError) as caught:
        load(engine, threads=2)
    assert str(caught.value) == "threads: an option of onnxruntime engines; 'unet' is for tensorrt-rtx:sm89"


# --- writing


def test_writes_only_the_finished_directory(tmp_path):
    with publish(tmp_path / "deep" / "unet") as folder:
        assert folder.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "unet").exists()
        fill(folder)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["unet", "unet.lock"]
    read_manifest(tmp_path / "deep" / "unet")


def test_a_failed_build_leaves_nothing(tmp_path):
    def build():
        with publish(tmp_path / "unet") as folder:
            fill(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert [p.name for p in tmp_path.iterdir()] == ["unet.lock"]


def test_refuses_to_replace_an_engine_unless_told(engine):
    with pytest.raises(UsageError) as caught, publish(engine):
        pytest.fail("the body must not run")
    assert str(caught.value) == f"output '{engine}' is an engine already; --force (overwrite=True) replaces it"
    with publish(engine, overwrite=True) as folder:
        fill(folder, b"second")
    assert (engine / "model.plan").read_bytes() == b"second"
    assert sorted(p.name for p in engine.parent.iterdir()) == ["unet", "unet.lock"]


def test_a_failed_replacement_keeps_the_engine(engine):
    with pytest.raises(RuntimeError), publish(engine, overwrite=True):
        raise RuntimeError
    assert (engine / "model.plan").read_bytes() == b"plan"
    read_manifest(engine)


def test_replaces_an_empty_directory(tmp_path):
    (tmp_path / "unet").mkdir()
    with publish(tmp_path / "unet") as folder:
        fill(folder)
    read_manifest(tmp_path / "unet")


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_replaces_what_is_no_engine(tmp_path, overwrite):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    (tmp_path / "note").write_text("")
    with pytest.raises(UsageError) as caught, publish(tmp_path / "thesis", overwrite=overwrite):
        pytest.fail("the body must not run")
    assert str(caught.value) == (
        f"output '{tmp_path / 'thesis'}' is neither empty nor an engine (it holds 'chapter1.tex'); choose another"
    )
    with pytest.raises(UsageError) as caught, publish(tmp_path / "note", overwrite=overwrite):
        pytest.fail("the body must not run")
    assert str(caught.value) == f"output '{tmp_path / 'note'}' is a file; an engine is a directory"


def test_never_replaces_an_engine_that_somebody_put_a_file_into(engine):
    (engine / "notes.txt").write_text("")
    with pytest.raises(UsageError) as caught, publish(engine, overwrite=True):
        pytest.fail("the body must not run")
    assert str(caught.value) == (
        f"output '{engine}' holds 'notes.txt', which is not part of the engine; move it away first"
    )


def test_a_second_build_waits_and_then_names_the_first(tmp_path):
    inside, done = threading.Event(), threading.Event()

    def first():
        with publish(tmp_path / "unet") as folder:
            inside.set()
            done.wait(20)
            fill(folder)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(20)
    with pytest.raises(HastenError) as caught, publish(tmp_path / "unet", wait=0.2):
        pytest.fail("the body must not run")
    done.set()
    thread.join()
    assert str(caught.value) == (
        f"process {os.getpid()} is building engine '{tmp_path / 'unet'}': waited 0.2 s; wait for it or choose "
        "another output"
    )
    read_manifest(tmp_path / "unet")


def test_a_second_build_that_waited_finds_the_engine_of_the_first(tmp_path):
    inside = threading.Event()

    def first():
        with publish(tmp_path / "unet") as folder:
            inside.set()
            time.sleep(0.3)
            fill(folder)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(20)
    with pytest.raises(UsageError, match=r"is an engine already; --force "), publish(tmp_path / "unet", wait=20):
        pytest.fail("the body must not run")
    thread.join()


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from hasten.backends.directory import publish
    with publish(sys.argv[1], overwrite=True) as folder:
        (folder / "model.plan").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
""")


def test_a_killed_build_leaves_nothing_that_loads_and_the_next_one_cleans_up(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "unet")], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "unet").exists()
    (left,) = (p for p in tmp_path.iterdir() if p.is_dir())
    with pytest.raises(HastenError, match=r"manifest\.json is missing"):
        load(left)
    with publish(tmp_path / "unet") as folder:
        fill(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unet", "unet.lock"]


def test_leftovers_of_other_outputs_stay(tmp_path):
    other = tmp_path / ".unet.5.123.00aa11bb.hasten-new"  # belongs to an output called "unet.5"
    other.mkdir()
    with publish(tmp_path / "unet") as folder:
        fill(folder)
    assert other.is_dir()


def test_an_engine_moved_aside_by_a_killed_build_is_put_back(engine):
    aside = engine.parent / ".unet.123.00aa11bb.hasten-old"
    engine.rename(aside)
    with pytest.raises(UsageError, match=r"is an engine already"), publish(engine):
        pytest.fail("the body must not run")
    assert (engine / "model.plan").read_bytes() == b"plan"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, wrapped):
    def full(self, content):
        error = OSError(errno.ENOSPC, "No space left on device")
        if wrapped:
            raise RuntimeError("PytorchStreamWriter failed writing file") from error
        raise error

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HastenError) as caught, publish(tmp_path / "unet") as folder:
        fill(folder)
    assert str(caught.value) == (
        f"engine '{tmp_path / 'unet'}': no space left on the disk; nothing was written: free some or choose "
        "another folder"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["unet.lock"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HastenError) as caught, publish(tmp_path / "file" / "unet"):
        pytest.fail("the body must not run")
    assert str(caught.value) == f"engine '{tmp_path / 'file' / 'unet'}' cannot be written: File exists"
