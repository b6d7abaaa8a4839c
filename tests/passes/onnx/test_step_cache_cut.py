"""What a step cache cuts where, in graphs written by hand, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from cached_session import TEACACHE, Session, control, fresh, keep
from onnx import TensorProto, helper, parser

from hasten.errors import HastenError, UsageError
from hasten.passes.onnx.step_cache import Cut, conditional, straight
from hasten.passes.onnx.verify import verify_model
from hasten.passes.steps.payload import Residual, Value
from hasten.passes.steps.policy import REUSE, Policy, Slot
from hasten.passes.steps.schedules import Interval
from hasten.passes.steps.teacache import TeaCache

BODY = """
  <ir_version: 10, opset_import: ["" : 20]>
  g (float[2,8] x, float[2] t) => (float[2,8] y)
  {
    s = Sin (t)
    axes = Constant <value_ints = [1]> ()
    e = Unsqueeze (s, axes)
    a = Mul (x, e)
    h = Tanh (a)
    k = Shape (t)
    b = Mul (h, e)
    c = Add (b, a)
    y = Add (c, x)
  }
"""


def by_hand(body: str = BODY) -> onnx.ModelProto:
    return parser.parse_model(body)


def test_what_is_read_after_the_region_without_depending_on_it_is_computed_before_it() -> None:
    model = by_hand(BODY.replace("y = Add (c, x)", "d = Mul (c, e) y = Add (d, x)"))
    cut = Cut(("x",), ("c",), ("e", "a", "h", "b", "c"), signal="x")
    made = conditional(model, cut, TEACACHE).programs["step"].model
    assert made is model, "changed in place: weights are not copied"
    verify_model(made)
    main = [n.op_type for n in made.graph.node]
    assert main.index("Unsqueeze") < main.index("If") < len(main) - 1
    assert "Tanh" not in main


def test_two_streams_have_states_of_their_own() -> None:
    body = """
      <ir_version: 10, opset_import: ["" : 20]>
      g (float[2,8] x, float[2,4] z) => (float[2,8] y, float[2,4] w)
      { a = Tanh (x) b = Tanh (z) r = ReduceSum <keepdims = 1> (b) c = Mul (a, r) d = Sin (b) y = Neg (c) w = Neg (d) }
    """
    cut = Cut(("x", "z"), ("c", "d"), ("a", "b", "r", "c", "d"), signal="x")
    cached = conditional(by_hand(body), cut, Policy("t", TeaCache((1.0, 0.0), 0.1), Residual()))
    assert [t.name for t in cached.state][-2:] == ["cache_residual", "cache_residual_1"]
    assert [t.shape for t in cached.state][-2:] == [(2, 8), (2, 4)]
    session = Session(cached.programs["step"].model)
    plain = Session(by_hand(body))
    rng, state = np.random.default_rng(0), fresh(cached)
    first = {"x": rng.normal(size=(2, 8)).astype("f"), "z": rng.normal(size=(2, 4)).astype("f")}
    computed = session({**first, **state, **control(0, 0.1)})
    wanted = plain(first)
    keep(state, computed)
    np.testing.assert_allclose(computed["y"], wanted["y"], atol=1e-6)
    later = {name: value + np.float32(0.25) for name, value in first.items()}
    reused = session({**later, **state, **control(1, 0.1, REUSE)})
    assert not reused["cache_computed"]
    np.testing.assert_allclose(reused["y"], wanted["y"] - 0.25, atol=1e-6)
    np.testing.assert_allclose(reused["w"], wanted["w"] - 0.25, atol=1e-6)


def test_modules_are_skipped_one_by_one_without_a_branch() -> None:
    """The second module reads what is computed from the first one's result, on every call."""
    body = """
      <ir_version: 10, opset_import: ["" : 20]>
      g (float[2,8] x) => (float[2,8] y)
      { a = Tanh (x) b = Sin (a) c = Add (b, x) d = Tanh (c) e = Sin (d) y = Add (e, c) }
    """
    cut = Cut(("x", "c"), ("b", "e"), ("a", "b", "d", "e"))
    policy = Policy("fora", Interval(2), Value(), "modules")
    cached = straight(by_hand(body), cut, policy, static=True)
    assert [t.name for t in cached.state] == ["cache_value", "cache_value_1"]
    compute, reuse = (Session(cached.programs[name].model) for name in ("compute", "reuse"))
    assert [n.op_type for n in cached.programs["reuse"].model.graph.node].count("Tanh") == 0
    x, state = np.linspace(-1, 1, 16, dtype="f").reshape(2, 8), fresh(cached)
    first = compute({"x": x})
    np.testing.assert_allclose(first["y"], Session(by_hand(body))({"x": x})["y"], atol=1e-6)
    keep(state, first)
    (again,) = reuse({"x": x + 1, **state}).values()
    np.testing.assert_allclose(again, np.sin(np.tanh(x)) + x + 1 + state["cache_value_1"], atol=1e-6)
    made = conditional(by_hand(body), cut, policy)
    assert [t.name for t in made.state] == ["cache_value", "cache_value_1"]
    graph = made.programs["step"].model.graph
    (choice,) = (n for n in graph.node if n.op_type == "If")
    branches = {a.name: [n.op_type for n in a.g.node] for a in choice.attribute}
    assert (branches["then_branch"].count("Tanh"), branches["else_branch"].count("Tanh")) == (2, 0)
    step, carried = Session(made.programs["step"].model), fresh(made)
    computed = step({"x": x, **carried, **control(0, 0.0)})
    keep(carried, computed)
    np.testing.assert_array_equal(computed["y"], first["y"])
    reused = step({"x": x + 1, **carried, **control(1, 0.0)})
    assert not reused["cache_computed"]
    np.testing.assert_array_equal(reused["y"], again)


def test_values_kept_beside_the_stream_and_a_signal_over_a_base() -> None:
    body = """
      <ir_version: 10, opset_import: ["" : 20]>
      g (float[2,8] x) => (float[2,8] y)
      { p = Tanh (x) a = Neg (x) k = Exp (a) c = Add (k, a) d = Mul (c, k) y = Add (d, p) }
    """
    cut = Cut(("a",), ("c",), ("k", "c"), kept=("k",), signal="p", signal_base="x", tap="c", tap_base="k")
    cached = conditional(by_hand(body), cut, replace(TEACACHE, decision=Watching((1.0, 0.0), 0.1)))
    assert [t.name for t in cached.state][-2:] == ["cache_residual", "cache_value_1"]
    session, state, x = Session(cached.programs["step"].model), fresh(cached), np.full((2, 8), 0.5, "f")
    first = session({"x": x, **state, **control(0, 0.1)})
    keep(state, first)
    np.testing.assert_allclose(first["y"], (np.exp(-x) - x) * np.exp(-x) + np.tanh(x), atol=1e-6)
    np.testing.assert_allclose(state["cache_previous"], np.tanh(x) - x, atol=1e-6)
    np.testing.assert_allclose(state["cache_seen"], -0.5, atol=1e-6)
    again = session({"x": x * 2, **state, **control(1, 0.1, REUSE)})
    wanted = (-2 * x + np.exp(-x)) * np.exp(-x) + np.tanh(2 * x)
    np.testing.assert_allclose(again["y"], wanted, atol=1e-6)


@dataclass(frozen=True)
class Watching(TeaCache):
    """Keeps the mean of what it is shown inside the region."""

    def slots(self) -> Any:
        return {**super().slots(), "seen": Slot(dtype="float32")}

    def decide(self, state: Any, signal: Any, control: Any) -> Any:
        following, compute = super().decide(state, signal, control)
        return {**following, "seen": state["seen"]}, compute

    def observe(self, state: Any, tap: Any, before: Any, after: Any, control: Any) -> Any:
        return {**state, "seen": tap.mean()}


def test_a_policy_whose_functions_return_their_operands() -> None:
    """`Value` stores the stream itself: nothing is exported, and each branch has an output of its own."""
    cached = conditional(
        by_hand(), Cut(("a",), ("c",), ("h", "b", "c"), signal="a"), replace(TEACACHE, payload=Value())
    )
    session, state = Session(cached.programs["step"].model), fresh(cached)
    x, t = np.ones((2, 8), "f"), np.full(2, 0.5, "f")
    first = session({"x": x, "t": t, **state, **control(0, 0.1)})
    keep(state, first)
    again = session({"x": x * 2, "t": t, **state, **control(1, 0.1, REUSE)})
    np.testing.assert_allclose(again["y"], first["y"] + 1, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "cut", "policy", "error", "message"),
    [
        (
            BODY.replace('"" : 20', '"" : 17'),
            Cut(("a",), ("c",), ("h", "b", "c"), signal="a"),
            TEACACHE,
            UsageError,
            "a step cache is written at opset 18 or newer, and the model has opset 17; export it again at opset 18 or "
            "newer",
        ),
        (
            BODY,
            Cut(("a",), ("c",), ("h", "b", "c"), signal="y"),
            TEACACHE,
            HastenError,
            "the decision's signal depends on c, the result of the region to be skipped",
        ),
        (
            BODY,
            Cut(("a",), ("c",), ("h", "b", "q"), signal="a"),
            TEACACHE,
            HastenError,
            "the region to be skipped names 'q', which is no value of the model's main graph",
        ),
        (
            BODY,
            Cut(("a",), ("c",), ("h", "b"), signal="a"),
            TEACACHE,
            HastenError,
            "c shall come out of the region to be skipped, and no node in it makes that",
        ),
        (
            BODY.replace("Add (c, x)", "Add (c, h)"),
            Cut(("a",), ("c",), ("h", "b", "c"), signal="a"),
            TEACACHE,
            HastenError,
            "h is made in the region to be skipped and read after it, by node 'y' (Add); the region must end in it",
        ),
        (
            BODY.replace("Mul (h, e)", "Mul (g, e)").replace("b =", "g = Neg (h) b ="),
            Cut(("a",), ("c",), ("h", "b", "c"), signal="a"),
            TEACACHE,
            HastenError,
            "h is made in the region to be skipped and read after it, by node 'g' (Neg); the region must end in it",
        ),
        (
            BODY,
            Cut(("a",), ("c",), ("h", "b", "c")),
            TEACACHE,
            HastenError,
            "teacache keeps a tensor like its signal, which this graph does not show",
        ),
        (
            BODY.replace("Add (c, x)", "Add (c, x) cache_step = Neg (x)"),
            Cut(("a",), ("c",), ("h", "b", "c"), signal="a"),
            TEACACHE,
            UsageError,
            "the model has a step cache already (its value 'cache_step'); give the one without",
        ),
    ],
)
def test_refusals(body: str, cut: Cut, policy: Policy, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        conditional(by_hand(body), cut, policy)
    assert str(caught.value) == message


def test_a_size_that_no_input_shows_is_refused() -> None:
    node = helper.make_node("NonZero", ["x"], ["n"])
    nodes = [node, helper.make_node("Neg", ["n"], ["m"]), helper.make_node("Neg", ["m"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 8))
    y = helper.make_tensor_value_info("y", TensorProto.INT64, (2, "found"))
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(
        HastenError, match=r"^teacache keeps a tensor like n, whose size '.*' does not follow from the si"
    ):
        conditional(model, Cut(("n",), ("m",), ("m",), signal="n"), TEACACHE)


@dataclass(frozen=True)
class Doubling(Residual):
    def reuse(self, state: Any, before: Any, control: Any) -> Any:
        return (before + state["residual"]).double()


@dataclass(frozen=True)
class Forgetful(TeaCache):
    def slots(self) -> Any:
        return {**super().slots(), "previous": Slot(like="signal", copies=2)}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            replace(TEACACHE, payload=Doubling()),
            "what teacache returns for c is float64 with 2 dimensions, and must be float32 with 2",
        ),
        (
            replace(TEACACHE, decision=Forgetful((1.0, 0.0), 0.1)),
            "what teacache keeps as 'previous' is float32 with 2 dimensions, and must be float32 with 3",
        ),
    ],
)
def test_a_policy_that_breaks_its_word(policy: Policy, message: str) -> None:
    with pytest.raises(HastenError) as caught:
        conditional(by_hand(), Cut(("a",), ("c",), ("h", "b", "c"), signal="a"), policy)
    assert str(caught.value) == message


def test_streams_that_a_residual_does_not_fit() -> None:
    body = """
      <ir_version: 10, opset_import: ["" : 20]>
      g (float[2,8] x) => (float[2] y) { a = Neg (x) c = ReduceMax <keepdims = 0> (a, axis) y = Neg (c) }
    """.replace("{ a", "<int64[1] axis = {1}> { a")
    message = r"^a step-cache function does not take .*a float32\[2, 8\].* c/computed float32\[2\]"
    with pytest.raises(HastenError, match=message):
        conditional(by_hand(body), Cut(("a",), ("c",), ("c",), signal="a"), TEACACHE)
