"""TensorRT-RTX builds without a GPU, and the preparation of graphs for them."""

from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.backends.build import build
from hasten.backends.engine import load
from hasten.backends.target import parse_target
from hasten.backends.tensorrt import build_plan
from hasten.backends.tensorrt_graph import prepare_for_tensorrt
from hasten.errors import HastenError, UsageError

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs the extra tensorrt-rtx")
SM89 = parse_target("tensorrt-rtx:sm89")


def model(nodes, inputs, outputs, initializers=(), opset=23, dtype=TensorProto.FLOAT16, domains=()):
    def value(name, shape):
        return helper.make_tensor_value_info(name, dtype, shape)

    graph = helper.make_graph(
        nodes, "g", [value(*i.popitem()) for i in inputs], [value(*o.popitem()) for o in outputs], list(initializers)
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def attention_model(q="x", k="x", v="x", dtype=TensorProto.FLOAT16, **attributes):
    node = helper.make_node("Attention", [q, k, v], ["y"], name="attend", scale=0.125, **attributes)
    shape = (1, 2, 64, 64)
    names = dict.fromkeys((q, k, v))
    return model([node], [{n: shape} for n in names], [{"y": shape}], dtype=dtype)


def saved(proto, tmp_path):
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


# --- real builds


@needs_rtx
@pytest.mark.parametrize("target", ["tensorrt-rtx:sm89", "tensorrt-rtx:sm120", "tensorrt-rtx:sm89,sm120"])
def test_builds_an_engine_without_a_gpu_and_audits_it(tiny, examples, tmp_path, monkeypatch, target):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = build(tiny, target=target, out=tmp_path / "tiny", example_inputs=examples, dtype="float16")
    found = engine.manifest.audit
    assert found["readable"]
    assert found["stream_capturable"]
    assert found["accelerators"] == sorted(parse_target(target).architectures)
    assert {k: found["counts"][k] for k in ("gemm_mha", "SiluGnor", "corrltn", "cjmp")} == {
        "gemm_mha": 1,
        "SiluGnor": 1,
        "corrltn": 2,
        "cjmp": 0,
    }
    assert found["layers"]["NORMALIZATION"] == 1
    assert found["peak_bytes"] > 50e6
    assert sorted(p.name for p in engine.path.iterdir()) == ["manifest.json", "model.plan"]
    assert engine.manifest.versions["tensorrt-rtx"].startswith("1.")
    with pytest.raises(HastenError) as caught:
        load(engine.path)(sample=examples[0].half(), timestep=examples[1].half())
    assert str(caught.value) == f"engine 'tiny' ({target}) needs an NVIDIA GPU, and torch finds none here"


@needs_rtx
def test_dynamic_sizes_become_a_profile(tiny, examples, dynamic_shapes, tmp_path):
    engine = build(
        tiny, target="tensorrt-rtx:sm89", out=tmp_path / "tiny", example_inputs=examples, dynamic_shapes=dynamic_shapes
    )
    assert engine.inputs[0].shape == ("batch", 4, "size", 16)
    assert engine.manifest.dims == {"batch": (1, 8), "size": (8, 32)}


@needs_rtx
def test_dynamic_onnx_inputs_need_shapes(tmp_path):
    relu = model([helper.make_node("Relu", ["x"], ["y"])], [{"x": ("b", 4)}], [{"y": ("b", 4)}])
    with pytest.raises(UsageError) as caught:
        build(relu, target="tensorrt-rtx:sm89", out=tmp_path / "relu")
    assert str(caught.value) == (
        "target tensorrt-rtx:sm89: input 'x' has dynamic sizes (b, 4); give shapes, three of them for min, opt "
        "and max, or one to fix them"
    )
    bounded = build(relu, target="tensorrt-rtx:sm89", out=tmp_path / "relu", shapes=("x:1x4", "x:2x4", "x:8x4"))
    assert bounded.manifest.dims == {"b": (1, 8)}


def conditional(body):
    """If(flag): a body in the one branch, the input itself in the other."""
    shape = (1, 8, 16, 16)
    out = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["reused"])], "then", [], [out("reused", TensorProto.FLOAT16, shape)]
    )
    otherwise = helper.make_graph(body, "else", [], [out("made", TensorProto.FLOAT16, shape)])
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise)],
        "g",
        [out("x", TensorProto.FLOAT16, shape), out("flag", TensorProto.BOOL, ())],
        [out("y", TensorProto.FLOAT16, shape)],
        [numpy_helper.from_array(np.ones((8, 8, 3, 3), dtype=np.float16), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@needs_rtx
def test_a_conditional_is_a_jump_and_cannot_be_captured(tmp_path):
    skipped = conditional([helper.make_node("Conv", ["x", "w"], ["made"], pads=[1, 1, 1, 1])])
    found = build_plan(saved(prepare_for_tensorrt(skipped), tmp_path), tmp_path, SM89).audit
    assert found["counts"]["cjmp"] == 1
    assert found["stream_capturable"] is False


@needs_rtx
def test_one_tensor_for_query_and_key_crashes_the_builder_unless_prepared(tmp_path):
    with pytest.raises(HastenError) as caught:
        build_plan(saved(attention_model(), tmp_path), tmp_path, SM89)
    assert str(caught.value).startswith("target tensorrt-rtx:sm89: the builder crashed (segmentation fault) at ")
    prepared = prepare_for_tensorrt(attention_model())
    found = build_plan(saved(prepared, tmp_path), tmp_path, SM89)
    assert found.audit["counts"]["gemm_mha"] == 1


@needs_rtx
def test_float32_attention_builds_when_prepared(tmp_path):
    unprepared = attention_model("q", "k", "v", dtype=TensorProto.FLOAT)
    with pytest.raises(HastenError, match=r"^target tensorrt-rtx:sm89: the build fails: .*dedicated kernel"):
        build_plan(saved(unprepared, tmp_path), tmp_path, SM89)
    build_plan(saved(prepare_for_tensorrt(unprepared), tmp_path), tmp_path, SM89)


@needs_rtx
def test_the_parser_names_the_node_that_it_refuses(tmp_path):
    det = helper.make_node("Det", ["x"], ["y"], name="my_det")
    graph = model([det], [{"x": (2, 3, 3)}], [{"y": (2,)}], dtype=TensorProto.FLOAT)
    with pytest.raises(HastenError) as caught:
        build_plan(saved(graph, tmp_path), tmp_path, SM89)
    text = str(caught.value)
    assert text.startswith("target tensorrt-rtx:sm89: the ONNX parser refuses the graph: node 'my_det' (Det): ")


@needs_rtx
def test_profiles_that_do_not_fit_are_refused(tmp_path):
    relu = model([helper.make_node("Relu", ["x"], ["y"])], [{"x": ("b", 4)}], [{"y": ("b", 4)}])
    with pytest.raises(HastenError) as caught:
        build_plan(saved(relu, tmp_path), tmp_path, SM89)
    assert str(caught.value).startswith("target tensorrt-rtx:sm89: the build fails: ")
    assert "optimization profile" in str(caught.value)


# --- preparation


def test_preparation_marks_every_attention_and_is_idempotent():
    assert [n.op_type for n in prepare_for_tensorrt(attention_model("q", "k", "q")).graph.node] == ["Attention"]
    first = prepare_for_tensorrt(attention_model("q", "q", "v"))
    assert [n.op_type for n in first.graph.node] == ["Max", "Attention"]
    assert list(first.graph.node[1].input) == ["q", "q_y_key", "v"]
    assert [a.i for a in first.graph.node[1].attribute if a.name == "TRT_decomposable"] == [1]
    again = onnx.ModelProto()
    again.CopyFrom(first)
    assert prepare_for_tensorrt(again) == first


def test_values_that_the_builder_merges_are_one_tensor():
    def node(op, source, out, **attributes):
        return helper.make_node(op, [source], [out], **attributes)

    def prepared(*nodes):
        attend = helper.make_node("Attention", ["q", "k", "x"], ["y"])
        made = prepare_for_tensorrt(model([*nodes, attend], [{"x": (1, 2, 8, 8)}], [{"y": (1, 2, 8, 8)}]))
        return [n.op_type for n in made.graph.node if n.op_type == "Max"]

    assert prepared(node("Identity", "x", "q"), node("Identity", "x", "k")) == ["Max"]
    assert prepared(node("Relu", "x", "q"), node("Relu", "x", "k")) == ["Max"]
    assert prepared(node("Relu", "x", "q"), node("Sigmoid", "x", "k")) == []
    assert prepared(node("Softmax", "x", "q", axis=1), node("Softmax", "x", "k", axis=2)) == []


def test_preparation_reaches_functions_and_refuses_them_in_control_flow():
    body = helper.make_function(
        "hasten",
        "Attention",
        ["q"],
        ["y"],
        [helper.make_node("Attention", ["q", "q", "q"], ["y"], name="inner")],
        [helper.make_opsetid("", 23)],
    )
    call = helper.make_node("Attention", ["x"], ["y"], name="outer", domain="hasten")
    straight = model([call], [{"x": (1, 2, 8, 8)}], [{"y": (1, 2, 8, 8)}], domains=["hasten"])
    straight.functions.append(body)
    prepared = prepare_for_tensorrt(straight)
    assert [n.op_type for n in prepared.functions[0].node] == ["Max", "Attention"]
    branch = conditional([helper.make_node("Attention", ["x"], ["made"], name="outer", domain="hasten")])
    branch.functions.append(body)
    with pytest.raises(HastenError) as caught:
        prepare_for_tensorrt(branch)
    assert str(caught.value) == (
        "node 'inner' (Attention): TensorRT's attention layer cannot stand inside If, Loop or Scan; spell it "
        "out as MatMul, Softmax, MatMul, which is fused into the same kernel"
    )


def top_k(count):
    nodes = [helper.make_node("TopK", ["x", "k"], ["values", "indices"], name="prune")]
    k = numpy_helper.from_array(np.array([count]), "k")
    return model(nodes, [{"x": (1, 8192)}], [{"values": (1, count)}], [k])


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            conditional([helper.make_node("Attention", ["x", "x", "x"], ["made"], name="attend")]),
            "node 'attend' (Attention): TensorRT's attention layer cannot stand inside If, Loop or Scan; spell "
            "it out as MatMul, Softmax, MatMul, which is fused into the same kernel",
        ),
        (
            attention_model("q", "k", "v", softcap=30.0),
            "node 'attend' (Attention): TensorRT does not import attention with softcap",
        ),
        (
            model(
                [helper.make_node("Attention", ["q", "q", "q", "", "p", "p"], ["y"], name="cached")],
                [{"q": (1, 2, 8, 8)}, {"p": (1, 2, 8, 8)}],
                [{"y": (1, 2, 8, 8)}],
            ),
            "node 'cached' (Attention): TensorRT imports attention with one output and no key-value cache only",
        ),
        (top_k(3841), "node 'prune' (TopK): K is 3841, and TensorRT takes at most 3840; keep fewer"),
        (
            model(
                [helper.make_node("QuickGelu", ["x"], ["y"], domain="com.microsoft")],
                [{"x": (1, 4)}],
                [{"y": (1, 4)}],
                domains=["com.microsoft"],
            ),
            "node 'y' (QuickGelu): TensorRT's ONNX parser has no importer for com.microsoft.QuickGelu; use standard "
            "operators, or give the model a function of that name",
        ),
    ],
)
def test_preparation_names_the_node_that_cannot_be_built(graph, message):
    with pytest.raises(HastenError) as caught:
        prepare_for_tensorrt(graph)
    assert str(caught.value) == message


def test_preparation_leaves_what_can_be_built():
    prepare_for_tensorrt(top_k(3840))
    gelu = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    prepare_for_tensorrt(model([gelu], [{"x": (1, 4)}], [{"y": (1, 4)}], domains=["com.microsoft"]))
