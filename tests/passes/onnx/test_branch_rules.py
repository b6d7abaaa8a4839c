"""The branch rules of ONNX targets: one graph that keeps to them, and one for each way to break them."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper, parser

from hasten.errors import HastenError
from hasten.passes.branch_rule import DEEPEST
from hasten.passes.onnx.branch_rules import require, violations
from hasten.passes.onnx.graph import OnnxGraph

TENSORRT, RUNTIME = "tensorrt-rtx:sm89", "onnxruntime:cpu"


def conditional(
    then: str = "a = Neg (x)",
    otherwise: str = "b = Abs (x)",
    *,
    predicate: str = "bool p",
    kinds: tuple[str, str] = ("float[2,8] a", "float[2,8] b"),
    output: str = "float[2,8] y",
    ours: bool = False,
) -> onnx.ModelProto:
    model = parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g ({predicate}, float[2,8] x, float[1,2,4,4] q) => ({output})
        {{
          [choose] y = If (p) <then_branch: graph = t () => ({kinds[0]}) {{ {then} }},
                               else_branch: graph = e () => ({kinds[1]}) {{ {otherwise} }}>
        }}
        """
    )
    if ours:
        model.graph.node[0].metadata_props.add(key="hasten.rule", value="step-cache")
    return model


def found(model: onnx.ModelProto, target: str) -> list[str]:
    return [v.rule for v in violations(OnnxGraph(model), target)]


@pytest.mark.parametrize("target", [TENSORRT, "tensorrt:sm90", RUNTIME])
def test_a_conditional_that_keeps_to_the_rules(target: str) -> None:
    assert found(conditional(ours=True), target) == []
    require(conditional(ours=True), target)


def test_what_stands_outside_a_conditional_is_not_asked() -> None:
    body = '<ir_version: 10, opset_import: ["" : 23]> g (float[1,2,4,4] q) => (float[1,2,4,4] y) '
    require(parser.parse_model(body + "{ z = NonZero (q) r = RandomNormalLike (q) y = Attention (q, q, q) }"), TENSORRT)


TWO = ("float[2,8] a", "float[2,4] b")
FLAT = {"otherwise": "m = Constant <value_ints = [16]> () b = Reshape (x, m)", "kinds": ("float[2,8] a", "float[16] b")}
FLAT["output"] = "float y"


@pytest.mark.parametrize(
    ("model", "target", "where", "rule", "found"),
    [
        pytest.param(
            conditional(predicate="bool[1] p"),
            TENSORRT,
            "node choose (If)",
            "predicate",
            "its predicate is bool of shape (1,); squeeze it to 0 dimensions",
            id="predicate-of-one-dimension",
        ),
        pytest.param(
            conditional(predicate="bool[2] p"),
            RUNTIME,
            "node choose (If)",
            "predicate",
            "its predicate is bool of shape (2,); make it one bool",
            id="many-predicates",
        ),
        pytest.param(
            conditional(predicate="int64 p"),
            RUNTIME,
            "node choose (If)",
            "predicate",
            "its predicate is int64 of shape (); make it one bool",
            id="predicate-of-numbers",
        ),
        pytest.param(
            conditional("a = Neg (x) c = Abs (x)", kinds=("float[2,8] a, float[2,8] c", "float[2,8] b")),
            RUNTIME,
            "node choose (If)",
            "outputs",
            "its branches return 2 and 1 values for 1 outputs; return one value for each output",
            id="outputs",
        ),
        pytest.param(
            conditional(otherwise="b = Cast <to = 10> (x)", kinds=("float[2,8] a", "float16[2,8] b")),
            RUNTIME,
            "node choose (If)",
            "dtype",
            "for y its branches return float32 and float16; cast one of them",
            id="dtype",
        ),
        pytest.param(
            conditional(**FLAT),
            TENSORRT,
            "node choose (If)",
            "rank",
            "for y its branches return 2 and 1 dimensions; reshape one of them",
            id="rank",
        ),
        pytest.param(
            conditional(
                "a = Concat <axis = 0> (x, x)", kinds=("float[4,8] a", "float[2,8] b"), output="float y", ours=True
            ),
            RUNTIME,
            "node choose (If)",
            "shape",
            "for y its branches return (4, 8) and (2, 8); both must return what the state keeps",
            id="shape",
        ),
        pytest.param(
            conditional("s = Attention (q, q, q) a = Neg (x)", "b = Abs (x)"),
            TENSORRT,
            "node choose.then_branch/s (Attention)",
            "attention",
            "Attention has no layer inside a conditional; spell it out as MatMul, Softmax, MatMul (the pass "
            "legalise does)",
            id="attention",
        ),
        pytest.param(
            conditional(otherwise="b = com.microsoft.QuickGelu (x)"),
            TENSORRT,
            "node choose.else_branch/b (com.microsoft.QuickGelu)",
            "contrib",
            "com.microsoft.QuickGelu is no standard operator; let the pass legalise spell it out",
            id="contrib",
        ),
        pytest.param(
            conditional("a = RandomNormalLike (x)", ours=True),
            RUNTIME,
            "node choose.then_branch/a (RandomNormalLike)",
            "random",
            "RandomNormalLike in a branch draws numbers only where a step computes; leave it out of the "
            "region (region=FIRST:LAST)",
            id="random",
        ),
        pytest.param(
            conditional("n = NonZero (x) a = Neg (x)"),
            TENSORRT,
            "node choose.then_branch/n (NonZero)",
            "data-dependent shape",
            "the size of NonZero's result depends on the data; leave it out of the branch",
            id="data-dependent",
        ),
    ],
)
def test_refusals(model: onnx.ModelProto, target: str, where: str, rule: str, found: str) -> None:
    with pytest.raises(HastenError) as caught:
        require(model, target)
    assert str(caught.value) == f"target {target}: {where} breaks the branch rule {rule!r}: {found}"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(conditional(**FLAT), id="ranks"),
        pytest.param(conditional("a = RandomNormalLike (x)"), id="random"),
        pytest.param(conditional("n = NonZero (x) a = Neg (x)"), id="data-dependent"),
        pytest.param(conditional("s = Attention (q, q, q) a = Neg (x)"), id="attention"),
        pytest.param(conditional(predicate="bool[1] p"), id="predicate"),
    ],
)
def test_what_onnx_runtime_runs_is_left_alone(model: onnx.ModelProto) -> None:
    require(model, RUNTIME)


def test_the_shapes_of_somebody_elses_branches_may_differ() -> None:
    shaped = conditional("a = Concat <axis = 0> (x, x)", kinds=("float[4,8] a", "float[2,8] b"), output="float[n,8] y")
    assert found(shaped, TENSORRT) == []


def test_a_function_that_is_called_in_a_branch() -> None:
    model = conditional("s = local.Look (q) a = Neg (x)")
    model.opset_import.append(helper.make_opsetid("local", 1))
    nodes = [helper.make_node("Attention", ["q", "q", "q"], ["s"], name="inner")]
    model.functions.append(helper.make_function("local", "Look", ["q"], ["s"], nodes, [helper.make_opsetid("", 23)]))
    assert [str(v).split(" breaks")[0] for v in violations(OnnxGraph(model), TENSORRT)] == [
        "node local.Look/inner (Attention)"
    ]


def nested(depth: int) -> onnx.ModelProto:
    kind = helper.make_tensor_value_info

    def graph(level: int, name: str) -> onnx.GraphProto:
        if level == 0:
            return helper.make_graph([helper.make_node("Neg", ["x"], [name])], name, [], [kind(name, 1, (2,))])
        other = helper.make_graph([helper.make_node("Abs", ["x"], [f"{name}e"])], "e", [], [kind(f"{name}e", 1, (2,))])
        node = helper.make_node(
            "If", ["p"], [name], f"if{level}", then_branch=graph(level - 1, f"{name}t"), else_branch=other
        )
        return helper.make_graph([node], name, [], [kind(name, 1, (2,))])

    made = graph(depth, "y")
    made.input.extend([kind("p", TensorProto.BOOL, ()), kind("x", TensorProto.FLOAT, (2,))])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_depth() -> None:
    assert found(nested(DEEPEST), TENSORRT) == []
    assert set(found(nested(DEEPEST + 1), RUNTIME)) == {"depth"}
    with pytest.raises(HastenError, match=r"'depth': 17 conditionals stand in each other; nest at most 16"):
        require(nested(DEEPEST + 1), TENSORRT)
