"""The same counts on ONNX graphs."""

import onnx
import pytest
from onnx import TensorProto, helper

from hasten.passes.cost import Cost, total
from hasten.passes.onnx.flops import costs, weight_bytes
from hasten.passes.onnx.graph import OnnxGraph


def graph_of(text):
    return OnnxGraph(onnx.parser.parse_model(text))


HEAD = '<ir_version: 10, opset_import: ["" : 23, "local" : 1]>\n'


@pytest.mark.parametrize(
    ("body", "flops"),
    [
        ("(float[2,4,8,8] x, float[6,2,3,3] w) => (y) { y = Conv <pads=[1,1,1,1], group=2> (x, w) }", 2 * 6 * 64 * 18),
        ("(float[1,4,5,5] x, float[4,6,2,2] w) => (y) { y = ConvTranspose <strides=[2,2]> (x, w) }", 100 * 24),
        ("(float[5,4] x, float[6,5] w) => (y) { y = Gemm <transA=1, transB=1> (x, w) }", 4 * 6 * 5),
        ("(float[2,3,4] x, float[4,5] w) => (y) { y = MatMul (x, w) }", 2 * 3 * 5 * 4),
        ('(float[2,3] x, float[3,4] w) => (y) { y = Einsum <equation="ij,jk->ik"> (x, w) }', 24),
        (
            "(float[2,3,5,16] q, float[2,3,7,16] k, float[2,3,7,4] v) => (y) { y = Attention (q, k, v) }",
            2 * 3 * 5 * 7 * 20,
        ),
        (
            "(float[2,5,48] q, float[2,7,16] k, float[2,7,4] v) => (y) "
            "{ y = Attention <q_num_heads=3, kv_num_heads=1> (q, k, v) }",
            2 * 3 * 5 * 7 * 20,
        ),
    ],
    ids=["conv", "conv-transpose", "gemm", "matmul", "einsum", "attention", "attention-of-grouped-heads"],
)
def test_multiplications(body, flops):
    counted = costs(graph_of(f"{HEAD}g {body.replace('=> (y)', '=> (float[] y)')}"))
    assert total(counted.costs).flops == 2 * flops
    assert counted.unknown == 0


def test_traffic_of_views_and_tables():
    found = costs(
        graph_of(
            f"{HEAD}g (float[8,4] x, float[1000,4] table, int64[2] i) => (float[4,8] a, float[2,4] b, float[8,4] c) "
            "<int64[2] s = {4, 8}> { a = Reshape (x, s) b = Gather (table, i) c = Relu (x) }"
        )
    ).costs
    assert found == {"Reshape": Cost(1, 0, 0), "Gather": Cost(1, 0, 2 * 32 + 16), "Relu": Cost(1, 0, 256)}


def test_symbols_count_as_one_and_are_named():
    counted = costs(graph_of(f"{HEAD}g (float[N,4] x, float[4,5] w) => (float[N,5] y) {{ y = MatMul (x, w) }}"))
    assert (counted.symbols, total(counted.costs).flops) == (("N",), 40)


def test_a_local_function_costs_what_its_calls_cost():
    counted = costs(
        graph_of(
            f"{HEAD}g (float[3,4] x, float[4,4] w) => (float[3,4] y) {{ h = local.f (x, w) y = local.f (h, w) }}\n"
            '<domain: "local", opset_import: ["" : 23]> f (a, b) => (c) { c = MatMul (a, b) }'
        )
    )
    assert counted.costs == {"MatMul": Cost(2, 2 * 2 * 3 * 4 * 4, 2 * 4 * (12 + 16 + 12))}


def test_weights_that_two_nodes_read_count_once():
    graph = graph_of(
        f"{HEAD}g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1,2,3,4}}> {{ h = MatMul (x, w) y = Add (h, w) }}"
    )
    assert weight_bytes(graph) == 16


def test_types_are_known_behind_group_normalization():
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4, 2, 2]) for n in "xy")
    scale = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "sb"]
    nodes = [
        helper.make_node("GroupNormalization", ["x", "s", "b"], ["n"], num_groups=2),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x, *scale], [y]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    counted = costs(OnnxGraph(model))
    assert counted.unknown == 0
    assert counted.costs["Relu"].bytes == 2 * 4 * 16
