"""A step cache cut into ONNX graphs: the same decisions and results as the FX graph's, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cached_session import STEPS, TEACACHE, Session, control, fresh, keep
from torch import nn

from hasten.backends.capture import capture
from hasten.backends.onnx_signature import rename
from hasten.backends.program import FlatProgram, flatten
from hasten.backends.region import find_cut, find_cut_onnx
from hasten.backends.step_cache import with_cache
from hasten.models.registry import get
from hasten.passes.fx import step_cache as fx_cache
from hasten.passes.fx.to_onnx import onnx_from_graph
from hasten.passes.onnx.step_cache import Cached, Cut, conditional, straight
from hasten.passes.steps.easycache import EasyCache
from hasten.passes.steps.first_block import FirstBlock
from hasten.passes.steps.forecast import Taylor
from hasten.passes.steps.payload import Residual
from hasten.passes.steps.policy import COMPUTE, DECIDE, REUSE, Policy
from hasten.passes.steps.retained import Retained

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


def inputs(step: int, batch: int = 2, dtype: str = "float32") -> dict[str, Any]:
    """A denoising trajectory's stand-in: it slows down, and jumps once."""
    rng = np.random.default_rng(7)
    start, way = rng.normal(size=(2, batch, 4, 6, 6))
    at = 1 - np.exp(-0.25 * step) + (0.6 if step >= 8 else 0.0)
    return {"x": (start + at * way).astype(dtype), "t": np.full(batch, 1 - step / STEPS, dtype)}


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
