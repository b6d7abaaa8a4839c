"""A step cache cut into ONNX graphs: the same decisions and results as the FX graph's, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, parser
from torch import nn

from hasten.backends.capture import capture
from hasten.backends.onnx_signature import rename
from hasten.backends.program import FlatProgram, flatten
from hasten.backends.region import find_cut, find_cut_onnx
from hasten.backends.step_cache import with_cache
from hasten.errors import HastenError, UsageError
from hasten.models.registry import get
from hasten.passes.fx import step_cache as fx_cache
from hasten.passes.fx.to_onnx import onnx_from_graph
from hasten.passes.onnx.step_cache import Cached, Cut, conditional, straight
from hasten.passes.onnx.verify import verify_model
from hasten.passes.steps.easycache import EasyCache
from hasten.passes.steps.first_block import FirstBlock
from hasten.passes.steps.forecast import Taylor
from hasten.passes.steps.payload import Residual, Value
from hasten.passes.steps.policy import COMPUTE, DECIDE, REUSE, Policy, Slot
from hasten.passes.steps.retained import Retained
from hasten.passes.steps.schedules import Interval
from hasten.passes.steps.teacache import TeaCache

STEPS = 12
TEACACHE = Policy("teacache", TeaCache((1.0, 0.0), 0.1), Residual())
FIRST_BLOCK = Policy("first-block", FirstBlock(0.1), Taylor(1), "tail", head=1)
EASYCACHE = Policy("easycache", EasyCache(0.1, retained=Retained(first=2, last=1)), Residual(), "output")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = self.modulation(emb)[:, None].chunk(3, -1)
        q, k, v = self.inward(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.outward(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Toy(nn.Module):
    """Three transformer blocks over the 36 pixels of a (B, 4, 6, 6) image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inward, self.time, self.outward = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h, emb = self.inward(x.flatten(2).transpose(1, 2)), self.time(t[:, None]).sin()
        for block in self.blocks:
            h = block(h, emb)
        return self.outward(h).transpose(1, 2).unflatten(2, (6, 6))


@dataclass(frozen=True)
class Case:
    """One model as FX graph and as ONNX, and the same cut of both."""

    flat: FlatProgram
    model: onnx.ModelProto
    fx: fx_cache.Cut
    cut: Cut

    def copy(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return model


def case_of(
    module: nn.Module, args: Any, kwargs: Any, dynamic: Any, opset: int, policy: Policy, region: str | None = None
) -> Case:
    """The same region of both graphs: it is looked for in each."""
    program = capture(module, args, kwargs, dynamic)
    flat = flatten(program.module(check_guards=False), program)
    model = onnx_from_graph(flat.module, flat.example_inputs, opset, flat.dynamic_shapes)
    rename(model, [t.name for t in flat.inputs], ["output"])
    return Case(flat, model, find_cut(flat.module, policy, region).cut, find_cut_onnx(model, policy, region).cut)


@cache
def toy(
    policy: Policy = TEACACHE, opset: int = 20, dtype: torch.dtype = torch.float32, *, dynamic: bool = False
) -> Case:
    torch.manual_seed(0)
    module = Toy().eval().to(dtype).requires_grad_(requires_grad=False)
    args = (torch.randn(2, 4, 6, 6, dtype=dtype), torch.rand(2, dtype=dtype))
    batch = torch.export.Dim("batch", min=1, max=8)
    return case_of(module, args, {}, ({0: batch}, {0: batch}) if dynamic else None, opset, policy)


class Session:
    def __init__(self, model: onnx.ModelProto) -> None:
        verify_model(model)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.session.run(self.outputs, {name: given[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


class Eager:
    """An FX program of `with_cache`, run by torch."""

    def __init__(self, flat: FlatProgram) -> None:
        self.flat = flat

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            found = self.flat.module(*(torch.from_numpy(np.asarray(given[s.name])) for s in self.flat.inputs))
        return {s.name: t.numpy() for s, t in zip(self.flat.outputs, found, strict=True)}


def exported(flat: FlatProgram, opset: int) -> Session:
    model = onnx_from_graph(flat.module, flat.example_inputs, opset, flat.dynamic_shapes)
    rename(model, [t.name for t in flat.inputs], [t.name for t in flat.outputs])
    return Session(model)


def fresh(cached: Cached, batch: int = 2) -> dict[str, Any]:
    sizes = {t.name: [batch if isinstance(d, str) else d for d in t.shape] for t in cached.state}
    return {t.name: np.full(sizes[t.name], t.start, t.dtype) for t in cached.state}


def inputs(step: int, batch: int = 2, dtype: str = "float32") -> dict[str, Any]:
    """A denoising trajectory's stand-in: it slows down, and jumps once."""
    rng = np.random.default_rng(7)
    start, way = rng.normal(size=(2, batch, 4, 6, 6))
    at = 1 - np.exp(-0.25 * step) + (0.6 if step >= 8 else 0.0)
    return {"x": (start + at * way).astype(dtype), "t": np.full(batch, 1 - step / STEPS, dtype)}


def control(step: int, threshold: float, force: int = DECIDE, limit: int = -1) -> dict[str, Any]:
    numbers = {"step": step, "steps": STEPS, "force": force, "limit": limit}
    made: dict[str, Any] = {f"cache_{name}": np.int64(value) for name, value in numbers.items()}
    return {**{k: np.asarray(v) for k, v in made.items()}, "cache_threshold": np.asarray(threshold, np.float32)}


def keep(state: dict[str, Any], outputs: dict[str, Any]) -> None:
    for name in [n for n in outputs if n.startswith("next_")]:
        state[name.removeprefix("next_")] = outputs.pop(name)


def run(
    step: Any, state: dict[str, Any], threshold: float, forces: Any = (), batch: int = 2, dtype: str = "float32"
) -> Any:
    """Decisions (as text) and results of a run of a conditional program."""
    state, mask, results = dict(state), "", []
    for i in range(STEPS):
        force = forces[i] if forces else DECIDE
        outputs = step({**inputs(i, batch, dtype), **state, **control(i, threshold, force)})
        keep(state, outputs)
        mask += str(int(outputs.pop("cache_computed")))
        (result,) = outputs.values()
        results.append(result)
    return mask, np.stack(results)


def run_straight(programs: dict[str, Any], state: dict[str, Any], threshold: float) -> Any:
    state, mask, results = dict(state), "", []
    for i in range(STEPS):
        given = {**inputs(i), **control(i, threshold)}
        decision = programs["decide"]({**given, **state})
        computed = bool(decision.pop("cache_computed"))
        assert all(name.startswith("next_") for name in decision)
        keep(state, decision)
        outputs = programs["compute" if computed else "reuse"]({**given, **state})
        keep(state, outputs)
        mask += str(int(computed))
        (result,) = outputs.values()
        results.append(result)
    return mask, np.stack(results)


POLICIES = {p.name: p for p in (TEACACHE, FIRST_BLOCK, EASYCACHE)}
THRESHOLDS = {"teacache": (0.05, 0.3), "first-block": (0.03, 0.2), "easycache": (0.05, 0.5)}


@cache
def conditional_of(name: str) -> tuple[Case, Policy, Cached]:
    policy = POLICIES[name]
    case = toy(policy)
    return case, policy, conditional(case.copy(), case.cut, policy)


@pytest.mark.parametrize("name", POLICIES)
def test_the_conditional_decides_and_computes_as_the_fx_graph_does(name: str) -> None:
    case, policy, cached = conditional_of(name)
    program = cached.programs["step"]
    reference = with_cache(case.flat, case.fx, policy, "conditional")
    flat = reference.programs["step"]
    mine = Session(program.model)
    assert mine.inputs == [t.name for t in flat.inputs]
    assert mine.outputs == [t.name for t in flat.outputs]
    assert [(t.name, t.dtype, list(t.shape), t.start) for t in cached.state] == [
        (s["name"], s["dtype"], list(s["shape"]), s["start"]) for s in reference.state
    ]
    assert [n.op_type for n in program.model.graph.node].count("If") == 1
    theirs, masks = exported(flat, 20), set()
    for threshold in THRESHOLDS[name]:
        state = fresh(cached)
        mask, results = run(mine, state, threshold)
        for other in (Eager(flat), theirs):
            other_mask, other_results = run(other, state, threshold)
            assert mask == other_mask
            np.testing.assert_allclose(results, other_results, atol=2e-5)
        masks.add(mask)
        assert 2 <= mask.count("1") < STEPS
    assert len(masks) == 2, "each threshold has a run of its own"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "easycache" else ()) for n in POLICIES]
)
def test_straight_programs_do_as_the_conditional_does(name: str) -> None:
    case, policy, branched = conditional_of(name)
    cached = straight(case.copy(), case.cut, policy, static=False)
    assert list(cached.programs) == ["compute", "reuse", "decide"]
    assert not any(n.op_type == "If" for p in cached.programs.values() for n in p.model.graph.node)
    sessions = {name: Session(p.model) for name, p in cached.programs.items()}
    reference = with_cache(case.flat, case.fx, policy, "straight").programs
    assert list(reference) == list(sessions)
    for program, session in sessions.items():
        assert session.inputs == [t.name for t in reference[program].inputs]
        assert session.outputs == [t.name for t in reference[program].outputs]
    step = Session(branched.programs["step"].model)
    for threshold in THRESHOLDS[name]:
        mask, results = run_straight(sessions, fresh(cached), threshold)
        wanted, wanted_results = run(step, fresh(cached), threshold)
        assert mask == wanted
        np.testing.assert_allclose(results, wanted_results, atol=2e-5)


def test_a_static_schedule_carries_no_state_of_a_decision() -> None:
    case = toy()
    cached = straight(case.copy(), case.cut, TEACACHE, static=True)
    assert list(cached.programs) == ["compute", "reuse"]
    assert [t.name for t in cached.state] == ["cache_residual"]
    compute, reuse = cached.programs["compute"], cached.programs["reuse"]
    assert (compute.extra_inputs, compute.extra_outputs) == ((), ("next_cache_residual",))
    assert (reuse.extra_inputs, reuse.extra_outputs) == (("cache_residual",), ())
    held = {t.name for t in reuse.model.graph.initializer}
    assert "blocks.1.outward.bias" not in held, "a reused call needs no weights of the region"
    assert "outward.bias" in held


@pytest.mark.parametrize("form", ["1" * STEPS, "100110010101", "1" + "0" * (STEPS - 1)])
def test_forced_decisions(form: str) -> None:
    case, _, cached = conditional_of("teacache")
    forces = [COMPUTE if c == "1" else REUSE for c in form]
    mask, results = run(Session(cached.programs["step"].model), fresh(cached), 0.0, forces)
    assert mask == form
    flat = with_cache(case.flat, case.fx, TEACACHE, "conditional").programs["step"]
    np.testing.assert_allclose(results, run(Eager(flat), fresh(cached), 0.0, forces)[1], atol=2e-5)
    model = Session(case.model)
    for i, computed in enumerate(form):
        if computed == "1":
            np.testing.assert_allclose(results[i], model(inputs(i))["output"], atol=2e-5)


def test_step_0_computes_whatever_is_forced() -> None:
    _, _, cached = conditional_of("teacache")
    mask, _ = run(Session(cached.programs["step"].model), fresh(cached), 0.0, [REUSE] * STEPS)
    assert mask == "1" + "0" * (STEPS - 1)


@pytest.mark.parametrize("opset", [18, 22, 23])
def test_opsets(opset: int) -> None:
    case = toy(opset=opset)
    cached = conditional(case.copy(), case.cut, TEACACHE)
    model = cached.programs["step"].model
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    flat = with_cache(case.flat, case.fx, TEACACHE, "conditional").programs["step"]
    mine, theirs = (run(p, fresh(cached), 0.3) for p in (Session(model), Eager(flat)))
    assert mine[0] == theirs[0]
    np.testing.assert_allclose(mine[1], theirs[1], atol=2e-5)


def test_a_symbolic_batch_stays_symbolic() -> None:
    case = toy(dynamic=True)
    cached = conditional(case.copy(), case.cut, TEACACHE)
    symbol = case.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert {t.name: t.shape for t in cached.state}["cache_residual"] == (symbol, 36, 32)
    session = Session(cached.programs["step"].model)
    flat = with_cache(case.flat, case.fx, TEACACHE, "conditional").programs["step"]
    for batch in (1, 3):
        mine, theirs = (run(p, fresh(cached, batch), 0.3, batch=batch) for p in (session, Eager(flat)))
        assert mine[0] == theirs[0]
        np.testing.assert_allclose(mine[1], theirs[1], atol=2e-5)


def test_half_precision_keeps_its_streams_and_decides_in_float32() -> None:
    case = toy(dtype=torch.float16)
    cached = conditional(case.copy(), case.cut, TEACACHE)
    assert {t.name: t.dtype for t in cached.state} == {
        "cache_previous": "float16",
        "cache_total": "float32",
        "cache_count": "int64",
        "cache_residual": "float16",
    }
    mask, results = run(Session(cached.programs["step"].model), fresh(cached), 0.3, dtype="float16")
    assert 2 <= mask.count("1") < STEPS
    assert results.dtype == np.float16
    assert np.isfinite(results).all()


def test_the_region_alone_is_in_the_branch() -> None:
    case, _, cached = conditional_of("teacache")
    model = cached.programs["step"].model
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    branches = {a.name: a.g for a in node.attribute}
    then, otherwise = branches["then_branch"], branches["else_branch"]
    assert [n.op_type for n in then.node].count("Softmax") == 3
    assert {n.op_type for n in otherwise.node} == {"Add", "Identity"}
    outside = [n.op_type for n in model.graph.node]
    assert "Softmax" not in outside
    assert outside.count("LayerNormalization") == 1, "the signal's own is computed on every call"
    assert not then.initializer, "weights stay in the main graph"
    assert {t.name: t.raw_data for t in case.model.graph.initializer}.items() <= {
        t.name: t.raw_data for t in model.graph.initializer
    }.items()
    assert [len(v.type.tensor_type.shape.dim) for v in then.output] == [
        len(v.type.tensor_type.shape.dim) for v in otherwise.output
    ]
    shown = {v.name for v in model.graph.value_info}
    assert shown.isdisjoint({o for n in then.node for o in n.output})
    assert {v.name for v in then.value_info} <= {o for n in then.node for o in n.output}


@pytest.mark.slow
def test_a_bundled_transformer_with_a_symbolic_batch() -> None:
    adapter = get("scenes-dit")
    shapes = adapter.dynamic_shapes("batch")
    case = case_of(adapter.module(), (), adapter.example_inputs(), shapes, 20, TEACACHE, "1:5")
    cached = conditional(case.copy(), case.cut, TEACACHE)
    session = Session(cached.programs["step"].model)
    flat = with_cache(case.flat, case.fx, TEACACHE, "conditional").programs["step"]
    for threshold in (0.05, 0.2):
        states, masks = [fresh(cached, 3), fresh(cached, 3)], ["", ""]
        for i in range(STEPS):
            given = {k: v.numpy() for k, v in adapter.example_inputs(batch=3).items()}
            given["timestep"] = np.full(3, 1 - i / STEPS, given["timestep"].dtype) * np.float32(1000)
            given["hidden_states"] = given["hidden_states"] * np.float32(1 - 0.05 * i)
            results = []
            for p, program in enumerate((session, Eager(flat))):
                outputs = program({**given, **states[p], **control(i, threshold)})
                keep(states[p], outputs)
                masks[p] += str(int(outputs.pop("cache_computed")))
                results += outputs.values()
            np.testing.assert_allclose(results[0], results[1], atol=1e-4)
        assert masks[0] == masks[1]
        assert 2 <= masks[0].count("1") < STEPS


# --- a graph written by hand: what is cut where

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
