"""A step cache cut into a graph: both forms compute what the policy says, and share no memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hasten.backends.region import find_cut
from hasten.errors import HastenError
from hasten.passes.fx.step_cache import Cached, Cut, conditional, straight
from hasten.passes.fx.traced import inline
from hasten.passes.fx.view import fake
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.policy import Policy

STEPS = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.feed = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.feed(self.norm(x))


class Net(nn.Module):
    """Four blocks of one stream, and a side input that is added after them."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.out = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x + side)


@pytest.fixture(scope="module")
def captured() -> tuple[Net, torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    inputs = (torch.randn(2, 16, 8), torch.randn(2, 16, 32))
    return net, torch.export.export(net, inputs).module(check_guards=False), inputs


def cut_of(module: torch.fx.GraphModule, first: int = 0) -> Cut:
    """Blocks ``first`` to the last; the signal is the norm of the first of them."""
    nodes = list(module.graph.nodes)
    adds = [n for n in nodes if n.target is torch.ops.aten.add.Tensor]
    norms = [n for n in nodes if n.target is torch.ops.aten.layer_norm.default]
    before, after = norms[first].args[0], adds[3]
    inside = nodes[nodes.index(before) + 1 : nodes.index(after) + 1]
    inside = [n for n in inside if n.op == "call_function"]
    return Cut((before,), (after,), tuple(inside), signal=norms[first])


def start(cached: Cached) -> dict[str, torch.Tensor]:
    return {t.name: torch.full(tuple(t.value.shape), t.start, dtype=t.value.dtype) for t in cached.state}


def controls(policy: Policy, step: int, force: int, threshold: float | None = None) -> dict[str, torch.Tensor]:
    threshold = policy.decision.threshold if threshold is None else threshold
    return {
        "cache_step": torch.tensor(step),
        "cache_steps": torch.tensor(STEPS),
        "cache_force": torch.tensor(force),
        "cache_threshold": torch.tensor(threshold, dtype=torch.float32),
        "cache_limit": torch.tensor(policy.decision.limit),
    }


def call(cached: Cached, name: str, inputs: Any, state: dict[str, torch.Tensor], now: Any) -> tuple[Any, bool | None]:
    """Run one program; its state is put into ``state``."""
    program = cached.programs[name]
    known = {**state, **now}
    results = list(program.module(*inputs, *(known[n] for n in program.extra_inputs)))
    own = len(results) - len(program.extra_outputs)
    written = dict(zip(program.extra_outputs, results[own:], strict=True))
    computed = written.pop("cache_computed", None)
    state.update(written)
    return results[:own], None if computed is None else bool(computed)


def walk(inputs: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    noise = torch.Generator().manual_seed(1)
    x, side = inputs
    return [(x + 0.04 * i * torch.randn(x.shape, generator=noise), side * (1 + i)) for i in range(STEPS)]


def run(cached: Cached, policy: Policy, inputs: Any, mask: str | None = None) -> tuple[list[torch.Tensor], str]:
    state, outputs, done = start(cached), [], ""
    forced = policy.decision.forced(STEPS) if mask is None else [int(c) for c in mask]
    for step, given in enumerate(walk(inputs)):
        now = controls(policy, step, int(forced[step]))
        if "step" in cached.programs:
            (output,), computed = call(cached, "step", given, state, now)
        else:
            _, computed = call(cached, "decide", given, state, now)
            (output,), _ = call(cached, "compute" if computed else "reuse", given, state, now)
        outputs.append(output)
        done += str(int(bool(computed)))
    return outputs, done


def by_hand(net: Net, inputs: Any, mask: str) -> list[torch.Tensor]:
    """The same in eager, with the residual of the last computed step."""
    outputs, residual = [], torch.zeros(())
    for (x, side), computes in zip(walk(inputs), mask, strict=True):
        h = net.into(x)
        if computes == "1":
            y = h
            for block in net.blocks:
                y = block(y)
            residual = y - h
        outputs.append(net.out(h + residual + side))
    return outputs


POLICIES = ("teacache:threshold=0.3,coefficients=1/0", "teacache:threshold=0.12,coefficients=1/0")


@pytest.mark.parametrize("text", POLICIES)
def test_both_forms_decide_and_compute_the_same(captured: Any, text: str) -> None:
    net, module, inputs = captured
    policy = parse(text)
    branching, mask = run(conditional(module, cut_of(module), policy), policy, inputs)
    apart, other = run(straight(module, cut_of(module), policy, static=False), policy, inputs)
    assert mask == other
    assert "0" in mask
    assert mask.count("1") > 2
    for a, b, c in zip(branching, apart, by_hand(net, inputs, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_a_forced_mask_is_followed(captured: Any) -> None:
    net, module, inputs = captured
    policy, mask = parse(POLICIES[0]), "100101110001"
    outputs, done = run(conditional(module, cut_of(module), policy), policy, inputs, mask)
    assert done == mask
    for a, b in zip(outputs, by_hand(net, inputs, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_first_step_computes_whatever_is_forced(captured: Any) -> None:
    _, module, inputs = captured
    policy = parse(POLICIES[0])
    assert run(conditional(module, cut_of(module), policy), policy, inputs, "0" * STEPS)[1] == "1" + "0" * (STEPS - 1)


def test_straight_programs_hold_no_more_than_they_need(captured: Any) -> None:
    _, module, _ = captured
    policy = parse("mask:" + "10" * 6)
    cached = straight(module, cut_of(module), policy, static=True)
    assert set(cached.programs) == {"compute", "reuse"}
    assert [t.name for t in cached.state] == ["cache_residual"]
    assert cached.programs["compute"].extra_inputs == ()
    assert cached.programs["reuse"].extra_inputs == ("cache_residual",)
    assert cached.programs["reuse"].extra_outputs == ()
    targets = [n.target for n in cached.programs["reuse"].module.graph.nodes]
    assert torch.ops.aten.layer_norm.default not in targets
    assert targets.count(torch.ops.aten.linear.default) == 2


def test_no_output_shares_memory_with_an_input(captured: Any) -> None:
    _, module, inputs = captured
    policy = parse(POLICIES[0])
    cached = conditional(module, cut_of(module), policy)
    for force in (0, 1):
        state = start(cached)
        residual = state["cache_residual"]
        call(cached, "step", inputs, state, controls(policy, 3, force))
        assert state["cache_residual"].data_ptr() != residual.data_ptr()
        assert state["cache_residual"].is_contiguous()


def test_nan_in_the_signal_computes(captured: Any) -> None:
    _, module, (x, side) = captured
    policy = parse(POLICIES[0])
    cached = conditional(module, cut_of(module), policy)
    state = start(cached)
    call(cached, "step", (x, side), state, controls(policy, 0, -1))
    assert call(cached, "step", (x, side), dict(state), controls(policy, 1, -1))[1] is False
    assert call(cached, "step", (x * np.nan, side), state, controls(policy, 1, -1))[1] is True


def test_inductor_runs_it_as_one_graph(captured: Any) -> None:
    from torch._inductor.compile_fx import compile_fx

    net, module, inputs = captured
    policy = parse(POLICIES[0])
    cached = conditional(module, cut_of(module), policy)
    program = cached.programs["step"]
    example = {**start(cached), **controls(policy, 0, -1)}
    compiled = compile_fx(program.module, [*inputs, *(example[n] for n in program.extra_inputs)])
    quick = replace(cached, programs={"step": replace(program, module=compiled)})
    with torch.no_grad():
        outputs, mask = run(quick, policy, inputs)
    assert mask == run(cached, policy, inputs)[1]
    for a, b in zip(outputs, by_hand(net, inputs, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_signal_behind_the_region_is_refused(captured: Any) -> None:
    _, module, _ = captured
    cut = cut_of(module)
    (output,) = module.graph.find_nodes(op="output")
    with pytest.raises(HastenError, match="signal depends on add_3, the result of the region"):
        conditional(module, replace(cut, signal=output.args[0][0]), parse(POLICIES[0]))


def test_a_policy_whose_signal_the_graph_lacks(captured: Any) -> None:
    _, module, _ = captured
    with pytest.raises(HastenError, match="teacache keeps a tensor like its signal, which this graph does not show"):
        conditional(module, replace(cut_of(module), signal=None), parse(POLICIES[0]))


def test_inlined_functions_may_not_make_tensors(captured: Any) -> None:
    _, module, _ = captured
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = fake(module.graph.find_nodes(op="placeholder")[0])
    with pytest.raises(HastenError, match="made a tensor of its own"):
        inline(graph, lambda a: a + torch.tensor([1.0, 2.0]).sum(), x)


@pytest.mark.parametrize("form", ["conditional", "straight"])
@pytest.mark.parametrize(
    "text",
    [
        "easycache:threshold=0.05",  # keeps the model's input
        "mask:bits=101010101010,granularity=output,payload=value",  # keeps its output
        "mask:bits=101010101010,granularity=output,payload=taylor",
    ],
)
def test_state_is_memory_of_its_own(captured: Any, text: str, form: str) -> None:
    _, module, inputs = captured
    policy = parse(text)
    cut = find_cut(module, policy, None).cut
    static = policy.decision.mask(STEPS) is not None
    cached = conditional(module, cut, policy) if form == "conditional" else straight(module, cut, policy, static=static)
    state = start(cached)
    for step, force in ((0, 1), (1, 1), (2, 0)):
        name = "step" if "step" in cached.programs else "compute" if force else "reuse"
        outputs, _ = call(cached, name, inputs, state, controls(policy, step, force))
        owners = [t.untyped_storage().data_ptr() for t in (*inputs, *outputs, *state.values())]
        assert len(owners) == len(set(owners))
