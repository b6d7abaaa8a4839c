"""What a SOURCE means, and the one sentence for each thing that it cannot be."""

import json
import pickle
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hasten.errors import HastenError, UsageError
from hasten.tools.source import ENGINE, MODEL, ONNX, PROGRAM, load_program, resolve


def test_every_kind_is_told_by_its_name(onnx_file, pt2_file, engine):
    everything = (ONNX, PROGRAM, MODEL, ENGINE)
    found = [resolve(str(s), kinds=everything).kind for s in (onnx_file, pt2_file, "scenes-unet", engine)]
    assert found == [ONNX, PROGRAM, MODEL, ENGINE]
    assert resolve("sd15-unet", reduced=True).text == "sd15-unet-reduced"
    assert resolve("sd15-unet-reduced", reduced=True).text == "sd15-unet-reduced"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sd15-unt",
            "there is no file, directory or model 'sd15-unt'; `hasten models` lists the models. "
            "Did you mean 'sd15-unet'?",
        ),
        ("", "the source is an empty word; give an .onnx or .pt2 file, a model's name or a directory"),
        (
            "model.pt",
            "source 'model.pt' has the name of a Python pickle, which is never loaded: it could run any code; "
            "save the program with torch.export.save (.pt2) or the weights as safetensors",
        ),
        (
            "model.safetensors",
            "source 'model.safetensors' holds weights without a model; name the model, and the weights' directory "
            "with --weights",
        ),
    ],
)
def test_what_cannot_be_a_source_is_refused_in_one_sentence(text, message):
    with pytest.raises(UsageError) as caught:
        resolve(text)
    assert str(caught.value) == message


def test_an_empty_directory_and_another_file_are_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        resolve(str(tmp_path))
    assert str(caught.value) == (
        f"source '{tmp_path}' is a directory without manifest.json (an engine), config.json or "
        "model_index.json (a model)"
    )
    other = tmp_path / "notes.txt"
    other.write_text("x")
    with pytest.raises(UsageError) as caught:
        resolve(str(other))
    assert str(caught.value) == f"source '{other}': the name of a file must end in .onnx or .pt2"


def test_an_engine_is_no_source_of_a_build(engine):
    with pytest.raises(UsageError) as caught:
        resolve(str(engine))
    assert str(caught.value) == (
        f"source '{engine}' is an engine, and this verb takes an ONNX file, a .pt2 file, a model; `hasten run` runs it "
        "and `hasten inspect` shows what it was built from"
    )


def test_options_of_named_models_are_refused_for_files(onnx_file):
    with pytest.raises(UsageError) as caught:
        resolve(str(onnx_file), reduced=True)
    assert str(caught.value) == f"--reduced is for named models; '{onnx_file}' is an ONNX file"


def onnx_bytes():
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def cyclic():
    model = onnx.load_from_string(onnx_bytes())
    model.graph.node[0].input[0] = "z"
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    return model.SerializeToString()


@pytest.mark.parametrize("verb", ["inspect", "optimize", "build"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read {}: there is no such file; give the path of an .onnx file"),
        (b"", "cannot read {}: the file is empty; export or download it again"),
        (
            b"hello, world",
            "cannot read {}: it is not an ONNX model (no protobuf of one); give the path of an .onnx file",
        ),
        (b"\x80\x04K\x01.", "cannot read {}: it is a Python pickle, not an ONNX model"),
        (cyclic(), "{}: the graph has a cycle: tensor 'y' depends on itself"),
    ],
    ids=["missing", "empty", "not-onnx", "pickle", "cyclic"],
)
def test_bad_onnx_files(hasten, tmp_path, verb, content, message):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    out = {"inspect": [], "optimize": ["-o", tmp_path / "out.onnx"], "build": ["-o", tmp_path / "engine"]}[verb]
    done = hasten(verb, path, *out)
    assert (done.code, done.out) == (2, "")
    if verb == "build" and content is None:
        assert done.err == f"hasten build: source '{path}': there is no such file\n"
    else:
        assert done.err == f"hasten {verb}: {message.format(path)}\n"
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "engine").exists()


def test_a_truncated_onnx_file(hasten, onnx_file, tmp_path):
    whole = onnx_file.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[:-1000])
    done = hasten("inspect", path)
    assert done.code == 2
    assert done.err == (
        f"hasten inspect: cannot read {path}: it is cut short: at least {done.err.split('at least ')[1].split()[0]} of "
        f"{done.err.split(' of ')[1].split()[0]} bytes are missing; download it again\n"
    )


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})], ids=["empty", "text", "pickle"])
def test_bad_pt2_files(tmp_path, content):
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(HastenError) as caught:
        load_program(path)
    assert str(caught.value) == f"'{path}' is no file that torch.export.save wrote"


def test_a_missing_pt2_file(hasten, tmp_path):
    path = tmp_path / "model.pt2"
    done = hasten("inspect", path)
    assert (done.code, done.err) == (2, f"hasten inspect: source '{path}': there is no such file\n")


def test_a_diffusers_directory_with_pickled_weights_is_refused(hasten, tmp_path):
    config = json.loads((Path(__file__).parents[2] / "models" / "scenes" / "dit.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": config["class"], **config["config"]}))
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    done = hasten("inspect", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("hasten inspect: ")
    assert "diffusion_pytorch_model.bin" in done.err
    assert "safetensors" in done.err
    assert len(done.err.splitlines()) == 1
