"""Compile a step cache into a graph: decision, both branches and the state as tensors in and out.

`conditional` makes ``torch.cond`` of a decision that depends on the data. `straight` makes programs without a branch:
``compute``, ``reuse`` and, where the decision depends on data, ``decide``, for a caller who picks one a call. A
program's inputs are the graph's own, then those of the state and the controls that it reads; its outputs are the
graph's own, the state that it writes and, where it decides, the decision. What a branch forwards is cloned, and the
state shares no memory with inputs and results, which are the caller's to write to.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hasten.errors import HastenError
from hasten.passes.fx.branch_rules import memory_root
from hasten.passes.fx.call import mutates
from hasten.passes.fx.flow import shares_memory
from hasten.passes.fx.traced import inline
from hasten.passes.fx.view import call_name, fake
from hasten.passes.steps.payload import Value
from hasten.passes.steps.policy import Control, Payload, Policy, Slot

PREFIX = "cache_"
COMPUTED = PREFIX + "computed"
CONTROLS: Mapping[str, torch.dtype] = {
    "step": torch.int64,
    "steps": torch.int64,
    "force": torch.int64,
    "threshold": torch.float32,
    "limit": torch.int64,
}
_CONTIGUOUS = {"memory_format": torch.contiguous_format}


@dataclass(frozen=True)
class Cut:
    """What is skipped, in nodes of one graph.

    ``before`` and ``after`` are the streams into and out of the region, pairwise; ``inside`` the nodes between, in the
    graph's order. ``kept``: other values made inside and read outside, which a reused call gets as they were.
    ``signal`` is what the decision looks at (it is computed on every call), ``tap`` what it looks at inside; where
    there is a base, it is what they have gained over it.
    """

    before: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...] = ()
    signal: fx.Node | None = None
    signal_base: fx.Node | None = None
    tap: fx.Node | None = None
    tap_base: fx.Node | None = None

    @property
    def pairs(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """Streams, then kept values, each with the stream that goes in: of `payloads`, in the same order."""
        return (*zip(self.before, self.after, strict=True), *((self.before[0], n) for n in self.kept))

    def payloads(self, policy: Policy) -> tuple[Payload, ...]:
        """What stands for each of `pairs` in a reused call."""
        return (*(policy.payload for _ in self.before), *(Value() for _ in self.kept))


@dataclass(frozen=True)
class Program:
    """One graph with its inputs and outputs beyond the original graph's, by name and in order."""

    module: fx.GraphModule
    extra_inputs: tuple[str, ...]
    extra_outputs: tuple[str, ...]


@dataclass(frozen=True)
class StateTensor:
    """One tensor that the caller carries from call to call: a fake of it, and the number that fills it at first."""

    name: str
    value: torch.Tensor
    start: float


@dataclass(frozen=True)
class Cached:
    """A graph with a step cache: its programs (``step`` alone, or ``compute``, ``reuse`` and ``decide``) and state."""

    programs: Mapping[str, Program]
    state: tuple[StateTensor, ...]


def conditional(module: fx.GraphModule, cut: Cut, policy: Policy) -> Cached:
    """One program, ``step``, with the region in the compute branch of a ``torch.cond``.

    Where modules are skipped one by one, what stands between and behind them is in both branches, which end with the
    graph's own results.
    """
    state = _states(module, cut, policy)
    return Cached({"step": _Writer(module, cut, policy, state).step()}, tuple(state.values()))


def straight(module: fx.GraphModule, cut: Cut, policy: Policy, *, static: bool) -> Cached:
    """Programs without a branch; ``decide`` is left out, and the decision's state with it, where it is ``static``."""
    state = _states(module, cut, policy)
    if static:
        for name in policy.decision.slots():
            del state[name]
    programs = {
        "compute": _Writer(module, cut, policy, state).compute(),
        "reuse": _Writer(module, cut, policy, state).reuse(),
    }
    if not static:
        programs["decide"] = _Writer(module, cut, policy, state).decide()
    return Cached(programs, tuple(state.values()))


class _Writer:
    """Writes one program. ``state`` and ``control`` become placeholders on first use of `_open`."""

    def __init__(self, module: fx.GraphModule, cut: Cut, policy: Policy, state: Mapping[str, StateTensor]) -> None:
        self.module, self.cut, self.policy = module, cut, policy
        self.decision, self.payloads = policy.decision, cut.payloads(policy)
        wanted = [n for n in (cut.signal, cut.signal_base, *cut.before) if n is not None]
        hoisted = _reach(wanted, lambda n: n.all_input_nodes)
        if early := [n.name for n in (*cut.after, *cut.kept) if n in hoisted]:
            raise HastenError(f"the decision's signal depends on {early[0]}, the result of the region to be skipped")
        (output,) = module.graph.find_nodes(op="output")
        writes = [n for n in module.graph.nodes if mutates(n, call_name(n))]
        self.inside = _whole_tuples([n for n in _with_writes(cut, writes) if n not in hoisted])
        # What nothing reads stays behind: it may hang on what a reused call does not make.
        live = _reach([output, *writes], lambda n: n.all_input_nodes)
        later = _reach(self.inside, lambda n: n.users) - set(self.inside)
        if torn := [n.name for n in writes if n in later and _owner(n) not in later]:
            raise HastenError(f"{torn[0]} writes in place to memory from before the region; it cannot be cut there")
        self.nodes = [n for n in module.graph.nodes if n in live and n.op not in ("placeholder", "output")]
        self.later = [n for n in self.nodes if n in later]
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.branches: dict[str, fx.GraphModule] = {}
        self.mode = _fake_mode(module)
        for node in module.graph.find_nodes(op="placeholder"):
            self._copy([node])
        device = fake(cut.before[0]).device
        self.state = {name: self._placeholder(t.name, t.value) for name, t in state.items()}
        self.control = Control(
            *(self._placeholder(PREFIX + n, torch.empty((), dtype=d, device=device)) for n, d in CONTROLS.items())
        )

    def step(self) -> Program:
        self._copy_prologue()
        decided, compute = self._decide()
        now = {**self.state, **decided}
        apart = self.policy.granularity == "modules"
        behind = self.later if apart else []
        ends = self._results() if apart else [a for _, a in self.cut.pairs]
        found, written = self._cond(now, compute, ends, behind)
        self.copies.update(zip(ends, found, strict=True))
        self._copy([] if apart else self.later)
        return self._close({**now, **written}, compute)

    def decide(self) -> Program:
        self._copy_prologue()
        decided, compute = self._decide()
        return self._close(decided, compute, whole=False)

    def compute(self) -> Program:
        # In the graph's own order: where modules are skipped one by one, what is inside reads what is behind others.
        self._copy(self.nodes)
        after = [self.copies[a] for _, a in self.cut.pairs]
        written = self._observe_and_store(self.graph, self.copies, self.state, self.control, after)
        return self._close(written, None)

    def reuse(self) -> Program:
        self._copy_prologue()
        self._epilogue(self._reuse(self.graph, self.copies, self.state, self.control))
        return self._close({}, None)

    def _decide(self) -> tuple[dict[str, fx.Node], fx.Node]:
        signal = _gained(self.graph, self.copies, self.cut.signal, self.cut.signal_base)
        own = {name: self.state[name] for name in self.decision.slots()}
        decided: tuple[dict[str, fx.Node], fx.Node] = inline(
            self.graph, self.decision.decide, own, signal, self.control
        )
        return decided

    def _results(self) -> list[fx.Node]:
        """The graph's own results that are made inside or behind."""
        made = {*self.inside, *self.later}
        own = _leaves(self.module.graph.find_nodes(op="output")[0].args[0])
        return [n for n in dict.fromkeys(own) if n in made]

    def _cond(
        self, state: Mapping[str, fx.Node], compute: fx.Node, ends: Sequence[fx.Node], behind: Sequence[fx.Node]
    ) -> tuple[list[fx.Node], dict[str, fx.Node]]:
        """Write the conditional node; returns ``ends``, and the state that a branch writes.

        ``ends`` are made inside or ``behind``, which is in both branches.
        """
        produced = {*self.inside, *behind}
        region = [n for n in self.cut.after[0].graph.nodes if n in produced]
        read = [n for node in region for n in node.all_input_nodes if n not in produced]
        tapped = [n for n in (self.cut.tap, self.cut.tap_base) if n is not None and n not in produced]
        live = list(dict.fromkeys([*read, *self.cut.before, *tapped]))
        for node in live:
            self._make_contiguous(node)
        operands = list(dict.fromkeys([*(self.copies[n] for n in live), *state.values(), *self.control]))

        full = fx.Graph()
        own = _operands(full, operands)
        values = {n: own[self.copies[n]] for n in live}
        for node in region:
            values[node] = full.node_copy(node, lambda n: values[n])
        values |= {n: _own(full, values[n]) for n in dict.fromkeys((*ends, *(a for _, a in self.cut.pairs)))}
        after = [values[a] for _, a in self.cut.pairs]
        held = {name: own[node] for name, node in state.items()}
        control = Control(*(own[c] for c in self.control))
        updated = self._observe_and_store(full, values, held, control, after)
        full.output((*(values[n] for n in ends), *(_own(full, node) for node in updated.values())))

        short = fx.Graph()
        own = _operands(short, operands)
        held = {name: own[node] for name, node in state.items()}
        given = {n: own[self.copies[n]] for n in live}
        forwarded = self._reuse(short, given, held, Control(*(own[c] for c in self.control)))
        given |= zip((a for _, a in self.cut.pairs), forwarded, strict=True)
        for node in behind:
            given[node] = short.node_copy(node, lambda n: given[n])
        short.output((*(_own(short, given[n]) for n in ends), *(_own(short, held[name]) for name in updated)))

        operands = _prune(operands, full, short)
        self.branches = {
            PREFIX + "compute": fx.GraphModule(torch.nn.Module(), full),
            PREFIX + "reuse": fx.GraphModule(torch.nn.Module(), short),
        }
        branches = [self.graph.get_attr(name) for name in self.branches]
        cond = self.graph.call_function(
            torch.ops.higher_order.cond, (compute, *branches, tuple(operands)), name=PREFIX + "cond"
        )
        results = [fake(n) for n in full.find_nodes(op="output")[0].args[0]]
        cond.meta["val"] = tuple(results)
        parts = []
        for i, value in enumerate(results):
            parts.append(self.graph.call_function(operator.getitem, (cond, i)))
            parts[-1].meta["val"] = value
        return parts[: len(ends)], dict(zip(updated, parts[len(ends) :], strict=True))

    def _make_contiguous(self, node: fx.Node) -> None:
        """Inductor may lay out anew what it computes; a branch must be given the strides that it was traced with."""
        value = fake(node)
        if isinstance(value, torch.Tensor) and value.ndim > 1 and node.op not in ("placeholder", "get_attr"):
            self.copies[node] = _own(self.graph, self.copies[node])

    def _observe_and_store(
        self,
        graph: fx.Graph,
        values: Mapping[fx.Node, fx.Node],
        state: Mapping[str, fx.Node],
        control: Control,
        after: Sequence[fx.Node],
    ) -> dict[str, fx.Node]:
        """Write what a call that computed does to the state; returns the entries that change."""
        before = [values[b] for b, _ in self.cut.pairs]
        tap = _gained(graph, values, self.cut.tap, self.cut.tap_base)
        own = {name: state[name] for name in self.decision.slots() if name in state}
        updated: dict[str, fx.Node] = {}
        if len(own) == len(self.decision.slots()):
            updated |= inline(graph, self.decision.observe, own, tap, before[0], after[0], control)
        for i, (payload, b, a) in enumerate(zip(self.payloads, before, after, strict=True)):
            stored = inline(graph, payload.store, {n: state[_slot(n, i)] for n in payload.slots()}, b, a, control)
            updated |= {_slot(name, i): node for name, node in stored.items()}
        return {name: node for name, node in updated.items() if node is not state[name]}

    def _reuse(
        self, graph: fx.Graph, values: Mapping[fx.Node, fx.Node], state: Mapping[str, fx.Node], control: Control
    ) -> list[fx.Node]:
        return [
            inline(graph, p.reuse, {n: state[_slot(n, i)] for n in p.slots()}, values[before], control)
            for i, (p, (before, _)) in enumerate(zip(self.payloads, self.cut.pairs, strict=True))
        ]

    def _copy_prologue(self) -> None:
        left = {*self.inside, *self.later}
        self._copy(n for n in self.nodes if n not in left)

    def _epilogue(self, after: Sequence[fx.Node]) -> None:
        self.copies.update(zip((a for _, a in self.cut.pairs), after, strict=True))
        self._copy(self.later)

    def _close(self, written: Mapping[str, fx.Node], compute: fx.Node | None, *, whole: bool = True) -> Program:
        """Write the output node, drop what nothing reads, and name what came in and goes out beside the graph's own."""
        own = _leaves(self.module.graph.find_nodes(op="output")[0].args[0]) if whole else []
        following = {PREFIX + n: node for n, node in written.items() if node is not self.state.get(n)}
        if compute is not None:
            following[COMPUTED] = compute
        # the caller may write to what it gives and gets, and the state stays
        kept = set(self.state.values())
        results = [_own(self.graph, n) if memory_root(n) in kept else n for n in (self.copies[n] for n in own)]
        taken = {memory_root(node) for node in results}
        for name, node in following.items():
            root = memory_root(node)
            if root in taken or root.op in ("placeholder", "get_attr"):
                following[name] = _own(self.graph, node)
            taken.add(root)
        self.graph.output((*results, *following.values()))
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() or mutates(n, call_name(n)))
        for node in (*self.state.values(), *self.control):
            if not node.users:
                self.graph.erase_node(node)
        names = {str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module")}
        held = {n: self.branches[n] if n in self.branches else operator.attrgetter(n)(self.module) for n in names}
        made = fx.GraphModule(held, self.graph)
        self.graph.lint()
        extra = [n.name for n in (*self.state.values(), *self.control) if n.users]
        return Program(made, tuple(extra), tuple(following))

    def _placeholder(self, name: str, like: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return node

    def _copy(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.copies[node] = self.graph.node_copy(node, lambda n: self.copies[n])


def _states(module: fx.GraphModule, cut: Cut, policy: Policy) -> dict[str, StateTensor]:
    """Every tensor of the policy's state for this region; those of a second stream have its number in their names."""
    found: dict[str, StateTensor] = {}
    mode = _fake_mode(module)

    def add(name: str, slot: Slot, stream: int) -> None:
        before, after = cut.pairs[stream]
        kind = fake(before)
        if slot.like:
            nodes = {"signal": cut.signal, "tap": cut.tap, "before": before, "after": after}
            if (node := nodes[slot.like]) is None:
                raise HastenError(f"{policy.name} keeps a tensor like its {slot.like}, which this graph does not show")
            kind = fake(node)
        shape = tuple(kind.shape) if slot.like else ()
        dtype = getattr(torch, slot.dtype) if slot.dtype else kind.dtype
        with mode:
            value = torch.empty((slot.copies, *shape) if slot.copies else shape, dtype=dtype, device=kind.device)
        found[name] = StateTensor(PREFIX + name, value, slot.start)

    for name, slot in policy.decision.slots().items():
        add(name, slot, 0)
    for stream, payload in enumerate(cut.payloads(policy)):
        for name, slot in payload.slots().items():
            add(_slot(name, stream), slot, stream)
    return found


def _with_writes(cut: Cut, writes: Sequence[fx.Node]) -> list[fx.Node]:
    """What is inside, and the calls that write in place to memory that is made there, which no value shows."""
    inside = set(cut.inside)
    own = [n for n in writes if n not in inside and _owner(n) in inside]
    # The views that they write through have no other users.
    views = _reach(own, lambda n: [a for a in n.all_input_nodes if a not in inside and _owner(a) in inside])
    within = inside | views
    return [n for n in cut.after[0].graph.nodes if n in within]


def _owner(node: fx.Node) -> fx.Node:
    """The value whose memory a view, or a call that writes in place, belongs to."""
    while node.args and isinstance(node.args[0], fx.Node) and shares_memory(node):
        node = node.args[0]
    return node


def _whole_tuples(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """Leave items of tuples that are made outside outside as well: what a branch is given are tensors."""
    within = set(inside)
    for node in inside:
        if node.target is operator.getitem and node.args[0] not in within:
            within.discard(node)
    return [n for n in inside if n in within]


def _gained(
    graph: fx.Graph, values: Mapping[fx.Node, fx.Node], value: fx.Node | None, base: fx.Node | None
) -> fx.Node | None:
    if value is None or base is None:
        return None if value is None else values[value]
    gained: fx.Node = inline(graph, operator.sub, values[value], values[base])
    return gained


def _operands(graph: fx.Graph, operands: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    made = {}
    for i, node in enumerate(operands):
        made[node] = graph.placeholder(f"operand_{i}")
        made[node].meta["val"] = fake(node)
    return made


def _prune(operands: list[fx.Node], *branches: fx.Graph) -> list[fx.Node]:
    """Drop the operands that no branch reads; returns the others."""
    rows = list(zip(operands, *(b.find_nodes(op="placeholder") for b in branches), strict=True))
    for _, *inner in rows:
        if not any(node.users for node in inner):
            for node in inner:
                node.graph.erase_node(node)
    return [operand for operand, *inner in rows if any(node.users for node in inner)]


def _own(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A contiguous copy: both branches must return the same strides, and memory of their own."""
    copy = graph.call_function(torch.ops.aten.clone.default, (node,), _CONTIGUOUS)
    value = fake(node)
    copy.meta["val"] = value.new_empty(value.shape)
    return copy


def _slot(name: str, stream: int) -> str:
    return f"{name}_{stream}" if stream else name


def _fake_mode(module: fx.GraphModule) -> Any:
    for node in module.graph.nodes:
        if hasattr(value := fake(node), "fake_mode"):
            return value.fake_mode
    raise HastenError("the graph's values have no known shapes and types")


def _leaves(value: Any) -> list[fx.Node]:
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]


def _reach(start: Iterable[fx.Node], following: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(following(node))
    return found
