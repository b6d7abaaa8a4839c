"""``run`` and ``compare``: inputs from files and at random, what is refused, errors and exit codes."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from hasten.tools.cli import main


def test_run_on_random_inputs_of_a_seed(hasten, engine, tmp_path):
    documents = [
        hasten("run", engine, "--seed", s, "-o", tmp_path / f"{i}.npz", "--json").json for i, s in enumerate("001")
    ]
    assert documents[0]["inputs"] == {"x": {"dtype": "float32", "shape": [2, 32, 8, 8], "random": True}}
    assert documents[0]["outputs"]["y"]["not_finite"] == 0
    assert documents[0]["written"] == [str(tmp_path / "0.npz")]
    first, same, other = (np.load(tmp_path / f"{i}.npz")["y"] for i in range(3))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_run_on_files_and_timing(hasten, engine, onnx_file, tmp_path):
    import onnxruntime

    x = np.random.default_rng(1).standard_normal((1, 32, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    np.save(tmp_path / "x.npy", x)
    wanted = onnxruntime.InferenceSession(str(onnx_file)).run(None, {"x": x})[0]
    for i, given in enumerate((tmp_path / "in.npz", f"x={tmp_path / 'x.npy'}")):
        done = hasten("run", engine, given, "-o", tmp_path / f"out{i}.npz", "--repeat", 3)
        assert done.code == 0
        assert "median of 3: " in done.out
        np.testing.assert_allclose(np.load(tmp_path / f"out{i}.npz")["y"], wanted, rtol=1e-4, atol=1e-5)


def test_run_with_sizes(hasten, engine):
    assert hasten("run", engine, "--shapes", "x:5x32x8x8", "--json").json["outputs"]["y"]["shape"] == [5, 32, 8, 8]


def test_run_refuses_sizes_of_no_input(hasten, engine):
    done = hasten("run", engine, "--shapes", "sample:5x32x8x8")
    assert (done.code, done.err) == (2, "hasten run: shapes: there is no input 'sample'; inputs: x.\n")


def saved(tmp_path, **arrays):
    path = tmp_path / "in.npz"
    np.savez(path, **arrays)
    return path


FINE = np.zeros((1, 32, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"xx": FINE}, "{engine}: there is no input 'xx'; inputs: x. Did you mean 'x'?"),
        ({"x": FINE[0]}, "engine 'tiny', input 'x': expected 4 dimensions (B, 32, 8, 8), found 3: (32, 8, 8)"),
        ({"x": FINE.astype(np.float64)}, "engine 'tiny', input 'x': expected float32, found float64; convert it first"),
        ({"x": FINE[:, :31]}, "engine 'tiny', input 'x': dimension 1 is 31, expected 32 of (B, 32, 8, 8)"),
        (
            {"x": np.where(np.arange(64).reshape(8, 8) < 3, np.nan, FINE).astype(np.float32)},
            "engine 'tiny', input 'x': 96 of 2048 values are NaN or infinity; check_inputs=False lets them pass",
        ),
    ],
    ids=["name", "rank", "dtype", "size", "nan"],
)
def test_run_refuses_inputs_that_do_not_fit(hasten, engine, tmp_path, arrays, message):
    done = hasten("run", engine, saved(tmp_path, **arrays), "-o", tmp_path / "out.npz")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"hasten run: {message.format(engine=engine)}\n"
    assert not (tmp_path / "out.npz").exists()


def test_run_refuses_files_that_are_no_arrays(hasten, engine, tmp_path):
    def message(*words):
        done = hasten("run", engine, *words)
        assert (done.code, done.out) == (2, "")
        return done.err.removeprefix("hasten run: ").removesuffix("\n")

    missing = tmp_path / "no.npz"
    assert message(missing) == f"inputs '{missing}': there is no such file; give an .npz file, or NAME=FILE.npy"
    pickled = saved(tmp_path, x=np.array([{"a": 1}], dtype=object))
    assert message(pickled) == (
        f"cannot read inputs '{pickled}': it holds Python objects (a pickle), which are never loaded; save plain arrays"
    )
    cut = tmp_path / "cut.npz"
    cut.write_bytes(saved(tmp_path, x=FINE).read_bytes()[:500])
    assert message(cut) == f"cannot read inputs '{cut}': it is not a whole numpy file; write it again"
    np.save(tmp_path / "x.npy", FINE)
    assert message(tmp_path / "x.npy") == (
        f"{tmp_path / 'x.npy'} holds one array without a name; write NAME={tmp_path / 'x.npy'}"
    )
    both = saved(tmp_path, x=FINE)
    assert message(both, f"x={tmp_path / 'x.npy'}") == "input 'x' is given twice"
    text = tmp_path / "x.txt"
    text.write_text("1")
    assert message(text) == (
        f"inputs '{text}': the name must end in .npz or .npy, as numpy.savez and numpy.save write them"
    )


def test_run_refuses_an_engine_with_one_byte_changed(hasten, engine, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(engine, copy)
    artifact = copy / "model.onnx"
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    done = hasten("run", copy)
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"hasten run: engine '{copy}': 'model.onnx' has changed since the engine was built (its sha256 differs): "
        "build the engine again\n"
    )


def test_run_refuses_a_foreign_manifest(hasten, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web page", "icons": []}))
    done = hasten("run", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"hasten run: engine '{tmp_path}': manifest.json has format None, not 'hasten-engine'\n"


def test_run_refuses_what_is_no_engine(hasten, onnx_file):
    done = hasten("run", onnx_file)
    assert (done.code, done.err) == (
        2,
        f"hasten run: source '{onnx_file}' is an ONNX file, and this verb takes an engine\n",
    )


@pytest.fixture(scope="module")
def picture_engine(tmp_path_factory):
    """(B, 3, 8, 8) -> tanh."""
    folder = tmp_path_factory.mktemp("pictures")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 3, 8, 8]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "tanh.onnx")
    assert main(["build", str(folder / "tanh.onnx"), "-o", str(folder / "engine"), "-q"]) == 0
    return folder / "engine"


def test_run_writes_pictures(hasten, picture_engine, engine, tmp_path):
    np.save(tmp_path / "x.npy", np.full((1, 3, 8, 8), 9.0, np.float32))
    assert hasten("run", picture_engine, f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "y.png").code == 0
    picture = Image.open(tmp_path / "y.png")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    done = hasten("run", engine, "-o", tmp_path / "z.png")
    assert (done.code, done.err) == (
        2,
        "hasten run: a PNG shows one output of shape (B, 3, H, W) or (B, 1, H, W); the outputs are y (2, 32, 8, 8); "
        "write .npz instead\n",
    )
    assert not (tmp_path / "z.png").exists()


def test_compare_passes_on_the_same_thing(hasten, onnx_file, engine):
    document = hasten("compare", onnx_file, engine, "--repeat", 2, "--json").json
    assert document["passed"] is True
    assert [o["name"] for o in document["outputs"]] == ["y"]
    assert document["seconds"]["a"]["runs"] == 2
    assert hasten("compare", onnx_file, engine, "--repeat", 1).out.endswith("PASSED\n")


def test_compare_fails_with_exit_5_and_says_by_how_much(hasten, onnx_file, tmp_path, tiny_onnx):
    model = tiny_onnx()
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    changed = np.frombuffer(bias.raw_data, np.float32) + np.float32(0.01)
    bias.raw_data = changed.tobytes()
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    done = hasten("compare", onnx_file, other, "--repeat", 1, "--json")
    assert done.code == 5
    assert done.json["passed"] is False
    assert done.json["exit_code"] == 5
    assert done.json["outputs"][0]["relative"] > 1e-3
    assert done.err.startswith(f"hasten compare: {other} differs from {onnx_file}: output 'y' is off by ")
    assert done.err.endswith("; --rtol is 0.0001\n")
    assert hasten("compare", onnx_file, other, "--repeat", 1, "--rtol", 1).code == 0


def test_compare_refuses_other_inputs(hasten, onnx_file, pt2_file):
    done = hasten("compare", onnx_file, pt2_file)
    assert (done.code, done.err) == (
        2,
        f"hasten compare: {onnx_file} has inputs x and {pt2_file} has sample; only things with the same inputs can be "
        "compared\n",
    )


def test_compare_on_given_inputs(hasten, onnx_file, engine, tmp_path):
    inputs = saved(tmp_path, x=np.ones((3, 32, 8, 8), np.float32))
    document = hasten("compare", onnx_file, engine, "--inputs", inputs, "--repeat", 1, "--json").json
    assert document["inputs"]["x"]["shape"] == [3, 32, 8, 8]
    done = hasten(
        "compare", onnx_file, engine, "--inputs", saved(tmp_path, x=np.full((1, 32, 8, 8), np.nan, np.float32))
    )
    assert (done.code, done.err) == (2, "hasten compare: input 'x': 2048 of 2048 values are NaN or infinity\n")
