"""Inputs and outputs of ONNX models."""

import onnx
import pytest
from onnx import TensorProto, helper

from hasten.backends.manifest import TensorSpec
from hasten.backends.onnx_signature import check_dynamic, fix_shapes, rename, signature
from hasten.backends.shapes import parse_profiles
from hasten.errors import HastenError


def add(a, b, kind=TensorProto.FLOAT16, nodes=None):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes or [helper.make_node("Add", ["a", "b"], ["c"])],
        "g",
        [value("a", kind, a), value("b", kind, b), value("w", kind, (1,))],
        [value("c", kind, a)],
        [helper.make_tensor("w", kind, (1,), [1.0])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_reads_names_dtypes_and_sizes_but_no_initializers():
    found = signature(add(("batch", 4), (None, "8*h")))
    assert found.inputs == (
        TensorSpec("a", "float16", ("batch", 4)),
        TensorSpec("b", "float16", ("b_0", "8*h")),
    )
    assert found.outputs == (TensorSpec("c", "float16", ("batch", 4)),)
    assert found.dims == {"batch": (1, None), "b_0": (1, None), "h": (1, None)}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TensorProto.FLOAT, "float32"),
        (TensorProto.DOUBLE, "float64"),
        (TensorProto.BFLOAT16, "bfloat16"),
        (TensorProto.INT64, "int64"),
        (TensorProto.BOOL, "bool"),
        (TensorProto.UINT8, "uint8"),
    ],
)
def test_dtypes_are_called_as_torch_and_numpy_call_them(kind, name):
    model = onnx.ModelProto()
    model.graph.input.append(helper.make_tensor_value_info("a", kind, (1,)))
    assert signature(model).inputs[0].dtype == name


def test_message_for_inputs_without_a_type_or_a_shape():
    model = onnx.ModelProto()
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, (1,)))
    with pytest.raises(HastenError) as caught:
        signature(model)
    assert str(caught.value) == "the model's 's' is no tensor of a known type"
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("s", TensorProto.FLOAT, None))
    with pytest.raises(HastenError) as caught:
        signature(model)
    assert str(caught.value) == "the model's 's' has no shape; run ONNX shape inference on the model first"


def test_fixes_a_symbol_wherever_it_stands():
    model = add(("batch", 4), (None, 4))
    fix_shapes(model, parse_profiles({"a": (2, 4), "b": (2, 4)}))
    assert [t.shape for t in (*signature(model).inputs, *signature(model).outputs)] == [(2, 4)] * 3
    model = add(("batch", 4), ("batch", 4))
    fix_shapes(model, parse_profiles(("a:1x4", "a:2x4", "a:8x4")))
    assert signature(model).inputs[0].shape == ("batch", 4)


def test_message_for_one_symbol_with_two_sizes():
    with pytest.raises(HastenError) as caught:
        fix_shapes(add(("batch", 4), ("batch", 4)), parse_profiles({"a": (2, 4), "b": (3, 4)}))
    assert str(caught.value) == "shapes: size 'batch' is 2 in one input and 3 in input 'b'"


def test_renames_by_position_and_keeps_inner_names_apart():
    nodes = [
        helper.make_node("Neg", ["a"], ["sample"]),  # an inner value that has the name wanted for an input
        helper.make_node("Add", ["sample", "b"], ["c"]),
    ]
    model = add((4,), (4,), nodes=nodes)
    del model.graph.input[2]
    rename(model, ["sample", "t"], ["sample"])
    onnx.checker.check_model(model, full_check=True)
    found = signature(model)
    assert [t.name for t in found.inputs] == ["sample", "t"]
    assert [t.name for t in found.outputs] == ["out_sample"]
    assert model.graph.node[0].input[0] == "sample"


def test_renames_inside_branches_too():
    value = helper.make_tensor_value_info
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}_out"])], name, [], [value(f"{name}_out", TensorProto.FLOAT, (4,))]
        )
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], **branches)],
        "g",
        [value("x", TensorProto.FLOAT, (4,)), value("flag", TensorProto.BOOL, ())],
        [value("y", TensorProto.FLOAT, (4,))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    rename(model, ["sample", "skip"], ["out"])
    onnx.checker.check_model(model, full_check=True)
    assert [a.g.node[0].input[0] for a in model.graph.node[0].attribute] == ["sample", "sample"]


def test_message_for_an_export_that_is_not_dynamic():
    wanted, found = [TensorSpec("x", "float32", ("b", 4))], [TensorSpec("x", "float32", (2, 4))]
    check_dynamic(wanted, wanted)
    with pytest.raises(HastenError) as caught:
        check_dynamic(wanted, found)
    assert str(caught.value) == (
        "dimension 0 of input 'x' shall be dynamic, and the export holds for 2 only; make it fixed, or find the "
        "pass that fixed it with --skip"
    )


def test_message_for_another_number_of_inputs():
    with pytest.raises(HastenError) as caught:
        rename(add((4,), (4,)), ["a"], ["c"])
    assert str(caught.value) == ("the export has inputs a, b, w and outputs c; the captured graph has a and c")
