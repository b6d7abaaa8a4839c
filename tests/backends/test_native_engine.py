"""An engine whose package calls the C++ kernels brings them along."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.backends.choosing import Choosing
from hasten.passes.ops.native import build


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 3, 1)).eval()
    x = torch.randn(1, 64, 32, 32)
    out = tmp_path_factory.mktemp("engines") / "conv"
    made = hasten.build(model, target="aoti:cpu", out=out, example_inputs=(x,), choosing=Choosing(tune="off"))
    with torch.no_grad():
        np.savez(out.parent / "io.npz", x=x.numpy(), y=model(x).numpy())
    return made


def load(engine, **environment):
    code = f"""
import numpy as np, hasten
io = np.load({str(engine.path.parent / "io.npz")!r})
try:
    engine = hasten.load({str(engine.path)!r})
except hasten.HastenError as error:
    print(error)
else:
    (y,) = engine(**{{engine.inputs[0].name: io["x"]}}).values()
    print(float(np.abs(np.asarray(y) - io["y"]).max() / np.abs(io["y"]).max()) < 1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_library_is_in_the_manifest(engine):
    assert (engine.path / build.LIBRARY).is_file()
    assert build.LIBRARY in engine.manifest.files
    (choice,) = engine.report["choices"]
    assert choice["implementation"] == "winograd-f4"
    # The workspace is that of all threads of the machine that built it.
    held = r"convolutions hold 0\.6 MB of transformed weights and \d+\.\d MB of workspace"
    assert any(re.fullmatch(held, note) for note in engine.report["notes"])


def test_it_runs_without_a_compiler_and_without_a_cache(engine, tmp_path):
    assert load(engine, CXX="/nowhere/g++", HASTEN_CACHE_DIR=str(tmp_path / "none")) == "True"


def test_it_says_plainly_what_it_needs(engine):
    said = load(engine, HASTEN_NATIVE="0")
    assert (
        said == f"the engine '{engine.path}' calls hasten's C++ kernels, and HASTEN_NATIVE=0 turns the C++ kernels off"
    )


def test_a_library_that_was_changed_is_refused(engine, tmp_path):
    import shutil

    copy = tmp_path / "engine"
    shutil.copytree(engine.path, copy)
    with (copy / build.LIBRARY).open("ab") as file:
        file.write(b"x")
    with pytest.raises(hasten.HastenError, match=build.LIBRARY):
        hasten.load(copy)
