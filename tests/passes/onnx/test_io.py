"""Reading and writing ONNX files: every kind of bad input gets its sentence, and nothing half-written stays."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from hasten.errors import UsageError
from hasten.passes.onnx import io

TEXT = '<ir_version: 10, opset_import: ["" : 18]> g (float[2, N] x) => (float[2, N] y) { y = Relu (x) }'


def weighted(elements=1000):
    """y = x + w with one weight."""
    weight = numpy_helper.from_array(np.arange(elements, dtype=np.float32), "w")
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [elements])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [info],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [elements])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def refused(source):
    with pytest.raises(UsageError) as error:
        io.read(source)
    return str(error.value)


def test_reads_a_path_and_a_proto(tmp_path):
    model = parser.parse_model(TEXT)
    onnx.save(model, tmp_path / "m.onnx")
    assert io.read(tmp_path / "m.onnx").model == model
    assert io.read(str(tmp_path / "m.onnx")).source == str(tmp_path / "m.onnx")
    assert io.read(model).model is model
    assert io.read(model).source == "the given ModelProto"


def test_reads_onnx_text_format(tmp_path):
    (tmp_path / "m.onnxtxt").write_text("# a comment\n" + TEXT)
    assert io.read(tmp_path / "m.onnxtxt").model.graph.node[0].op_type == "Relu"
    (tmp_path / "bad.onnxtxt").write_text("not a model")
    assert refused(tmp_path / "bad.onnxtxt").startswith(
        f"cannot read {tmp_path / 'bad.onnxtxt'}: it is not ONNX's text format: "
    )


def test_message_for_a_missing_file(tmp_path):
    path = tmp_path / "none.onnx"
    assert refused(path) == f"cannot read {path}: there is no such file; give the path of an .onnx file"


def test_message_for_a_folder(tmp_path):
    assert refused(tmp_path) == f"cannot read {tmp_path}: it is a folder; give the path of an .onnx file in it"


def test_message_for_an_empty_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    assert refused(path) == f"cannot read {path}: the file is empty; export or download it again"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n....", "it is a PNG image, not an ONNX model"),
        (b"PK\x03\x04....", "it is a zip archive (a torch checkpoint or .pt2 package), not an ONNX model"),
        (b"\x80\x02}q\x00.", "it is a Python pickle (an old torch checkpoint), not an ONNX model"),
        (b"hello, world", "it is not an ONNX model (no protobuf of one); give the path of an .onnx file"),
        (b"\x08\x0a", "it holds no graph: the file is cut short or not an ONNX model; export or download it again"),
    ],
    ids=["png", "zip", "pickle", "text", "header-only"],
)
def test_message_for_something_else(tmp_path, content, what):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert refused(path) == f"cannot read {path}: {what}"


def test_message_for_a_truncated_file(tmp_path):
    content = weighted().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(content[:-1000])
    message = refused(path)
    assert message.startswith(f"cannot read {path}: it is cut short: at least ")
    assert message.endswith("bytes are missing; download it again")


def test_truncation_anywhere_is_refused_or_complete(tmp_path):
    content = parser.parse_model(TEXT).SerializeToString()
    path = tmp_path / "m.onnx"
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        assert refused(path)


def test_message_names_a_tensor_on_the_cycle():
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", [info], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert refused(model) == "the given ModelProto: the graph has a cycle: tensor 'a' depends on itself"


def test_finds_a_cycle_through_a_branch():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["z"], ["t"])], "b", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, [2])]
    )
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["e"])], "e", [], [helper.make_tensor_value_info("e", TensorProto.FLOAT, [2])]
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(nodes, "g", infos, [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert refused(model) == "the given ModelProto: the graph has a cycle: tensor 'y' depends on itself"


@pytest.mark.parametrize(
    ("opset", "how"),
    [(10, "convert it with onnx.version_converter"), (99, "update the onnx package")],
    ids=["old", "new"],
)
def test_message_for_an_opset(opset, how):
    model = parser.parse_model(TEXT)
    model.opset_import[0].version = opset
    newest = onnx.defs.onnx_opset_version()
    assert refused(model) == f"the given ModelProto: has opset {opset}, and hasten reads 11 to {newest}; {how}"


def test_message_for_no_opset():
    model = parser.parse_model(TEXT)
    del model.opset_import[:]
    assert refused(model) == "the given ModelProto: names no version (opset) of the standard operators; export it again"


def test_unknown_domains_are_noted():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "acme" : 1]> g (float[2] x) => (float[2] y) { y = acme.Blur (x) }'
    )
    assert io.read(model).notes == ("operators of the unknown domain 'acme' are left alone: Blur",)


def test_a_local_function_is_not_unknown():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "acme" : 1]> g (float[2] x) => (float[2] y) { y = acme.Blur (x) }'
        '<domain: "acme", opset_import: ["" : 18]> Blur (a) => (b) { b = Relu (a) }'
    )
    assert io.read(model).notes == ()


class TestExternalData:
    def saved(self, tmp_path):
        path = tmp_path / "m.onnx"
        io.write(weighted(), path, external=True)
        return path

    def test_round_trip_leaves_the_model_as_it_was(self, tmp_path):
        model = weighted()
        before = model.SerializeToString()
        files = io.write(model, tmp_path / "m.onnx", external=True)
        assert [f.name for f in files] == ["m.onnx", "m.onnx.data"]
        assert model.SerializeToString() == before
        assert io.read(tmp_path / "m.onnx").model == model
        assert files[0].stat().st_size < 300
        onnx.checker.check_model(str(files[0]), full_check=True)
        assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]

    def test_small_models_stay_in_one_file(self, tmp_path):
        assert io.write(weighted(), tmp_path / "m.onnx") == [tmp_path / "m.onnx"]
        assert io.read(tmp_path / "m.onnx").model == weighted()

    def test_weights_above_the_limit_go_beside(self, tmp_path, monkeypatch):
        monkeypatch.setattr(io, "INLINE_LIMIT", 3000)
        assert len(io.write(weighted(), tmp_path / "m.onnx")) == 2

    def test_message_for_a_missing_file(self, tmp_path):
        path = self.saved(tmp_path)
        (tmp_path / "m.onnx.data").unlink()
        assert refused(path) == (
            f"{path}: tensor 'w' needs 4000 bytes of the external file 'm.onnx.data', which is not there; "
            f"put it into {tmp_path}"
        )

    def test_message_for_a_short_file(self, tmp_path):
        path = self.saved(tmp_path)
        (tmp_path / "m.onnx.data").write_bytes(b"\0" * 100)
        assert refused(path) == (
            f"{path}: tensor 'w' needs bytes 0 to 4000 of the external file 'm.onnx.data', which has 100; "
            "copy or download it again"
        )

    @pytest.mark.parametrize("location", ["../secret", "/etc/hostname", ""], ids=["up", "absolute", "none"])
    def test_message_for_a_path_that_escapes(self, tmp_path, location):
        path = self.saved(tmp_path)
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].external_data[0].value = location
        path.write_bytes(model.SerializeToString())
        assert refused(path) == (
            f"{path}: tensor 'w' is said to be in {location!r}, outside the model's folder; "
            "such a path is never followed"
        )

    def test_a_link_out_of_the_folder_is_not_followed(self, tmp_path):
        path = tmp_path / "in" / "m.onnx"
        path.parent.mkdir()
        io.write(weighted(), path, external=True)
        (path.parent / "m.onnx.data").rename(tmp_path / "out.data")
        (path.parent / "m.onnx.data").symlink_to(tmp_path / "out.data")
        assert "outside the model's folder" in refused(path)

    def test_message_for_a_wrong_length(self, tmp_path):
        path = self.saved(tmp_path)
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].dims[0] = 999
        path.write_bytes(model.SerializeToString())
        assert refused(path) == (
            f"{path}: tensor 'w' takes 3996 bytes and its entry for 'm.onnx.data' says 4000; export the model again"
        )

    def test_a_proto_without_its_folder_is_refused(self, tmp_path):
        model = onnx.load(self.saved(tmp_path), load_external_data=False)
        assert refused(model) == (
            "the given ModelProto: tensor 'w' is in the external file 'm.onnx.data', "
            "and a proto has no folder to look in; give the model's path"
        )

    def test_typed_fields_and_bfloat16_survive(self, tmp_path):
        model = weighted()
        tensor = helper.make_tensor("b", TensorProto.BFLOAT16, [600], np.arange(600, dtype=np.float32))
        model.graph.initializer.append(tensor)
        io.write(model, tmp_path / "m.onnx", external=True)
        back = io.read(tmp_path / "m.onnx").model
        assert numpy_helper.to_array(back.graph.initializer[1]).tolist() == numpy_helper.to_array(tensor).tolist()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        io.write(weighted(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_message_for_a_missing_output_folder(tmp_path):
    path = tmp_path / "none" / "m.onnx"
    with pytest.raises(UsageError) as error:
        io.write(weighted(), path)
    assert str(error.value) == f"cannot write {path}: there is no folder {path.parent}; create it first"
