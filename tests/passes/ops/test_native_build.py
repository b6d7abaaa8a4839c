"""Where the C++ kernels cannot be had, everything works without them, and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.passes.ops.native import build

RUN = """
import torch
from hasten.passes.ops.native import build
import hasten.passes.ops
from hasten.passes.ops.winograd_conv2d import reference
print(build.load())
x, w = torch.randn(1, 8, 6, 6), torch.randn(4, 8, 3, 3)
y = torch.ops.hasten.winograd_conv2d(x, w, None, None, None, 4, 4)
assert ((y - reference(x, w)).norm() / reference(x, w).norm()) < 1e-5
made = torch.ops.hasten.winograd_weight(w, 4)
assert torch.equal(torch.ops.hasten.winograd_conv2d(x, made, None, None, None, 4, 4), y)
"""


def run(**environment):
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_turned_off():
    assert run(HASTEN_NATIVE="0") == "HASTEN_NATIVE=0 turns the C++ kernels off"


def test_no_compiler(tmp_path):
    said = run(CXX="/nowhere/g++", HASTEN_CACHE_DIR=str(tmp_path))
    assert said == "no C++ compiler ('/nowhere/g++' was not found); apt install g++, or set CXX"
    assert not any(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\ncase $* in *--version*|*-dM*) exec g++ \"$@\";; esac\necho 'a.cpp:1: error: no' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    said = run(CXX=str(compiler), HASTEN_CACHE_DIR=str(tmp_path / "cache"))
    assert said == f"{compiler} could not compile the C++ kernels: a.cpp:1: error: no"
    assert not any((tmp_path / "cache").rglob("*.so"))


def test_two_processes_build_once(tmp_path):
    """The compiler here only writes a file, slowly: what is tested is who calls it."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        f"""#!/bin/sh
case $* in *--version*|*-dM*) exec g++ "$@";; esac
echo compiled >> {tmp_path}/log
sleep 2
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "HASTEN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", "from hasten.passes.ops.native import build; print(build.built())"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "library\n"
    assert (tmp_path / "log").read_text() == "compiled\n"


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    said = run(HASTEN_CACHE_DIR=str(tmp_path / "file"))
    assert said.startswith(f"cannot keep the C++ kernels in {tmp_path / 'file' / 'native'}")
    assert said.endswith("set HASTEN_CACHE_DIR to a folder")


def test_the_fingerprint_sees_the_sources(monkeypatch, tmp_path):
    before = build.fingerprint.__wrapped__()
    for name in (*build.SOURCES, *build.HEADERS):
        (tmp_path / name).write_bytes((build.HERE / name).read_bytes())
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.fingerprint.__wrapped__() == before
    with (tmp_path / "winograd.cpp").open("a") as file:
        file.write("// changed\n")
    assert build.fingerprint.__wrapped__() != before


def test_the_fingerprint_sees_what_is_linked(monkeypatch):
    before = build.fingerprint.__wrapped__()
    monkeypatch.setattr(build, "_link_flags", lambda: ["-L/elsewhere"])
    assert build.fingerprint.__wrapped__() != before


@pytest.mark.parametrize("name", sorted(build.SCHEMAS))
def test_every_declared_operator_is_implemented(name):
    import torch

    assert build.load() is None
    operator = build.SCHEMAS[name].partition("(")[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hasten::{operator}", "CPU")
