"""Compile a step cache into an ONNX graph: decision, both branches and the state as tensors in and out.

`conditional` makes an ``If`` of a decision that depends on the data. `straight` makes programs without a branch:
``compute``, ``reuse`` and, where the decision depends on data, ``decide``, for a caller who picks one a call. A
program's inputs are the graph's own, then those of the state and the controls that it reads; its outputs are the
graph's own, then the state that it writes (``next_cache_x`` of ``cache_x``) and, where it decides, the decision,
``cache_computed``. Weights stay where they are: branches read those of the main graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from hasten.errors import HastenError, UsageError
from hasten.passes.onnx.parts import live, ordered, split
from hasten.passes.onnx.protos import Known, identity, info, node, renamed, settled, without_weights
from hasten.passes.onnx.traced import RULE, Value, fresh, own_names, trace
from hasten.passes.steps.payload import Value as Kept
from hasten.passes.steps.policy import Control, Payload, Policy, Slot

PREFIX, NEXT = "cache_", "next_"
COMPUTED = PREFIX + "computed"
CONTROLS: Mapping[str, str] = {
    "step": "int64",
    "steps": "int64",
    "force": "int64",
    "threshold": "float32",
    "limit": "int64",
}
OLDEST_OPSET = 18
"""The oldest opset that torch's exporter writes a policy in."""


@dataclass(frozen=True)
class Cut:
    """What is skipped, in names of values of one model's main graph.

    ``before`` and ``after`` are the streams into and out of the region, pairwise; ``inside`` one value of each node
    between. ``kept``: other values made inside and read outside, which a reused call gets as they were. ``signal`` is
    what the decision looks at (it is computed on every call), ``tap`` what it looks at inside; where there is a base,
    it is what they have gained over it.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    inside: tuple[str, ...]
    kept: tuple[str, ...] = ()
    signal: str | None = None
    signal_base: str | None = None
    tap: str | None = None
    tap_base: str | None = None

    def payloads(self, policy: Policy) -> tuple[Payload, ...]:
        """What stands for each stream, then for each kept value, in a reused call."""
        return (*(policy.payload for _ in self.before), *(Kept() for _ in self.kept))


@dataclass(frozen=True)
class Program:
    """One model with its inputs and outputs beyond the original model's, by name and in order."""

    model: onnx.ModelProto
    extra_inputs: tuple[str, ...]
    extra_outputs: tuple[str, ...]


@dataclass(frozen=True)
class StateTensor:
    """One tensor that the caller carries from call to call, and the number that fills it at first."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    start: float


@dataclass(frozen=True)
class Cached:
    """A model with a step cache: its programs (``step`` alone, or ``compute``, ``reuse`` and ``decide``) and state."""

    programs: Mapping[str, Program]
    state: tuple[StateTensor, ...]


def conditional(model: onnx.ModelProto, cut: Cut, policy: Policy) -> Cached:
    """One program, ``step``, with the region in the compute branch of an ``If``.

    The program is ``model`` itself, changed in place. Where modules are skipped one by one, what stands between and
    behind them is in both branches, which end with the model's own results. Raises `UsageError` for an opset below 18,
    `HastenError` for a cut that does not fit the graph or the policy.
    """
    writer = _Writer(model, cut, policy)
    return Cached({"step": writer.step()}, tuple(writer.state.values()))


def straight(model: onnx.ModelProto, cut: Cut, policy: Policy, *, static: bool) -> Cached:
    """Programs without a branch; ``decide`` is left out, and the decision's state with it, where it is ``static``.

    The program ``compute`` is ``model`` itself, changed in place; the others have copies of the weights they read.
    Raises as `conditional` does.
    """
    writer = _Writer(model, cut, policy)
    if static:
        for name in policy.decision.slots():
            del writer.state[name]
    programs = {} if static else {"decide": writer.decide()}
    programs = {"reuse": writer.reuse(), **programs}
    return Cached({"compute": writer.compute(), **programs}, tuple(writer.state.values()))


def require_opset(model: onnx.ModelProto) -> int:
    """The opset of the standard operators; `UsageError` for one that is too old for a step cache."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise UsageError(
            f"a step cache is written at opset {OLDEST_OPSET} or newer, and the model has opset {opset}; "
            f"export it again at opset {OLDEST_OPSET} or newer"
        )
    return opset


class _Writer:
    """Writes programs; ``state`` is what they carry."""

    def __init__(self, model: onnx.ModelProto, cut: Cut, policy: Policy) -> None:
        self.model, self.cut, self.policy = model, cut, policy
        self.decision, self.payloads = policy.decision, cut.payloads(policy)
        self.opset = require_opset(model)
        self.names = set(own_names(model.graph))
        if taken := sorted({PREFIX + name for name in (*CONTROLS, "computed")} & self.names):
            raise UsageError(f"the model has a step cache already (its value {taken[0]!r}); give the one without")
        leaving = (*cut.after, *cut.kept)
        looked_at = [name for name in (cut.signal, cut.signal_base) if name is not None]
        closed = policy.granularity != "modules"
        self.parts = split(model.graph, cut.inside, cut.before, leaving, looked_at, closed=closed)
        known = Known(model)
        self.before = [known.value(name) for name in (*cut.before, *(cut.before[0] for _ in cut.kept))]
        self.after = [known.value(name) for name in leaving]
        self.apart = not closed
        made = {name for n in (*self.parts.inside, *self.parts.later) for name in n.output}
        results = [known.value(v.name) for v in model.graph.output if v.name in made] if self.apart else self.after
        self.ends = list(dict.fromkeys(results))
        self.signal, self.tap = (known.value(name) if name is not None else None for name in (cut.signal, cut.tap))
        self.state = self._states(known.symbols)
        self.control = Control(*(Value(PREFIX + name, dtype, ()) for name, dtype in CONTROLS.items()))
        self.constants: list[onnx.TensorProto] = []

    @property
    def held(self) -> dict[str, Value]:
        """The state as a program is given it."""
        return {name: Value(t.name, t.dtype, t.shape) for name, t in self.state.items()}

    def step(self) -> Program:
        nodes = list(self.parts.before)
        decided, compute = self._decide(nodes)
        written = self._if(nodes, {**self.held, **decided}, compute)
        nodes += [] if self.apart else self.parts.later
        written = {**{n: v.name for n, v in decided.items()}, **written}
        return self._close(self.model, nodes, {n: written[n] for n in self.state if n in written}, compute)

    def decide(self) -> Program:
        nodes = list(self.parts.before)
        decided, compute = self._decide(nodes)
        return self._close(
            without_weights(self.model), nodes, {n: v.name for n, v in decided.items()}, compute, results=False
        )

    def compute(self) -> Program:
        nodes = list(self.model.graph.node)
        written = self._observe_and_store(nodes, self.held, self.tap, self.cut.tap_base, self.after)
        return self._close(self.model, nodes, {n: v.name for n, v in written.items()}, None)

    def reuse(self) -> Program:
        nodes = list(self.parts.before)
        for stream, value in zip(self.after, self._reuse(nodes, self.held), strict=True):
            nodes.append(identity(value.name, stream.name))
        nodes = ordered([*nodes, *self.parts.later])
        return self._close(without_weights(self.model), nodes, {}, None)

    def _decide(self, nodes: list[onnx.NodeProto]) -> tuple[dict[str, Value], Value]:
        """Write the decision; returns the state entries that it changes, and the predicate."""
        own = {name: self.held[name] for name in self.decision.slots()}
        signal = self._gained(nodes, self.signal, self.cut.signal_base)
        decided, compute = self._trace(nodes, "decide", self.decision.decide, own, signal, self.control)
        self._check(compute, Value("", "bool", ()), "decides")
        for name, value in decided.items():
            self._check(value, own[name], f"keeps as {name!r}")
        return {name: value for name, value in decided.items() if value != own[name]}, compute

    def _if(self, nodes: list[onnx.NodeProto], state: Mapping[str, Value], compute: Value) -> dict[str, str]:
        """Write the conditional node; returns the names of the state that a branch writes."""
        behind = self.parts.later if self.apart else []
        made = {name for n in (*self.parts.inside, *behind) for name in n.output}
        inner = {v.name: self.fresh(f"{v.name}/computed") for v in self.ends}
        after = [v._replace(name=inner.get(v.name, v.name)) for v in self.after]
        tap = self.tap._replace(name=inner.get(self.tap.name, self.tap.name)) if self.tap is not None else None
        base = inner.get(self.cut.tap_base or "", self.cut.tap_base)
        full = [renamed(n, inner) for n in self.model.graph.node if not made.isdisjoint(n.output)]
        updated = self._observe_and_store(full, state, tap, base, after)
        short: list[onnx.NodeProto] = []
        other = {v.name: reused.name for v, reused in zip(self.after, self._reuse(short, state), strict=True)}
        other |= {name: self.fresh(f"{name}/reused") for n in behind for name in n.output if name}
        short = ordered([*short, *(renamed(n, other) for n in behind)])
        written = {name: NEXT + PREFIX + name for name in updated}
        outputs = [*(v.name for v in self.ends), *written.values()]
        kinds = [*self.ends, *(state[name] for name in updated)]
        computed, reused = ([v._replace(name=names[v.name]) for v in self.ends] for names in (inner, other))
        infos = {v.name: v for v in self.model.graph.value_info}
        branches = {
            "then_branch": self._branch(full, PREFIX + "compute", [*computed, *updated.values()], kinds, infos),
            "else_branch": self._branch(short, PREFIX + "reuse", [*reused, *(state[n] for n in updated)], kinds, {}),
        }
        choice = helper.make_node("If", [compute.name], outputs, name=PREFIX + "cond", **branches)
        choice.metadata_props.add(key="hasten.rule", value=RULE)
        nodes.append(choice)
        return written

    def _branch(
        self,
        nodes: list[onnx.NodeProto],
        name: str,
        results: Sequence[Value],
        kinds: Sequence[Value],
        infos: Mapping[str, onnx.ValueInfoProto],
    ) -> onnx.GraphProto:
        """A graph without inputs that returns ``results``, each under a name of its own."""
        free = {output for n in nodes for output in n.output}
        outputs = []
        for value, kind in zip(results, kinds, strict=True):
            output = value.name
            if output not in free:
                output = self.fresh(f"{name}/{value.name}")
                nodes.append(identity(value.name, output))
            free.discard(output)
            outputs.append(info(kind._replace(name=output)))
        nodes, _ = live(nodes, [o.name for o in outputs])
        graph = helper.make_graph(nodes, name, [], outputs)
        graph.value_info.extend(infos[name] for n in nodes for name in n.output if name in infos)
        return graph

    def _observe_and_store(
        self,
        nodes: list[onnx.NodeProto],
        state: Mapping[str, Value],
        tap: Value | None,
        tap_base: str | None,
        after: Sequence[Value],
    ) -> dict[str, Value]:
        """Write what a call that computed does to the state; returns the entries that change."""
        own = {name: state[name] for name in self.decision.slots() if name in state}
        kept = self._kept(state)
        tap = self._gained(nodes, tap, tap_base)
        observes = len(own) == len(self.decision.slots())

        def update(own: Any, kept: Any, tap: Any, before: Any, after: Any, control: Any) -> Any:
            updated = self.decision.observe(own, tap, before[0], after[0], control) if observes else {}
            streams = zip(self.payloads, kept, before, after, strict=True)
            return updated, [payload.store(s, b, a, control) for payload, s, b, a in streams]

        updated, stored = self._trace(nodes, "store", update, own, kept, tap, self.before, list(after), self.control)
        updated = updated | {_slot(name, i): value for i, s in enumerate(stored) for name, value in s.items()}
        for name, value in updated.items():
            self._check(value, self.held[name], f"keeps as {name!r}")
        return {name: value for name, value in updated.items() if value != state[name]}

    def _reuse(self, nodes: list[onnx.NodeProto], state: Mapping[str, Value]) -> list[Value]:
        def reuse(kept: Any, before: Any, control: Any) -> Any:
            streams = zip(self.payloads, kept, before, strict=True)
            return [payload.reuse(s, b, control) for payload, s, b in streams]

        reused: list[Value] = self._trace(nodes, "reuse", reuse, self._kept(state), self.before, self.control)
        for value, stream in zip(reused, self.after, strict=True):
            self._check(value, stream, f"returns for {stream.name}")
        return reused

    def _kept(self, state: Mapping[str, Value]) -> list[dict[str, Value]]:
        """Each payload's own part of the state."""
        return [{name: state[_slot(name, i)] for name in p.slots()} for i, p in enumerate(self.payloads)]

    def _gained(self, nodes: list[onnx.NodeProto], value: Value | None, base: str | None) -> Value | None:
        if value is None or base is None:
            return value
        gained = value._replace(name=self.fresh(f"{PREFIX}gained/{value.name}"))
        nodes.append(node("Sub", [value.name, base], gained.name))
        return gained

    def _check(self, found: Value, wanted: Value, what: str) -> None:
        if (found.dtype, len(found.shape)) != (wanted.dtype, len(wanted.shape)):
            raise HastenError(
                f"what {self.policy.name} {what} is {found.dtype} with {len(found.shape)} dimensions, and must be "
                f"{wanted.dtype} with {len(wanted.shape)}"
            )

    def _trace(self, nodes: list[onnx.NodeProto], base: str, function: Any, *operands: Any) -> Any:
        traced = trace(function, *operands, opset=self.opset, fresh=self.fresh, base=PREFIX + base)
        nodes += traced.nodes
        self.constants += traced.constants
        return traced.result

    def fresh(self, base: str) -> str:
        """A name that nothing in any of the programs has."""
        return fresh(base, self.names)

    def _close(
        self,
        made: onnx.ModelProto,
        nodes: list[onnx.NodeProto],
        written: Mapping[str, str],
        compute: Value | None,
        *,
        results: bool = True,
    ) -> Program:
        """Make ``made`` the program of ``nodes``, without what nothing reads. ``written``: state entry -> its value."""
        outputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in self.model.graph.output]
        outputs = outputs if results else []
        own = len(outputs)
        for name, value in written.items():
            output = NEXT + PREFIX + name
            if value != output:
                nodes.append(identity(value, output))
            outputs.append(info(self.held[name]._replace(name=output)))
        if compute is not None:
            nodes.append(identity(compute.name, COMPUTED))
            outputs.append(info(compute._replace(name=COMPUTED)))
        kept, names = live(nodes, [o.name for o in outputs])
        extra = [v for v in (*self.held.values(), *self.control) if v.name in names]
        body = onnx.GraphProto(node=kept)
        made_in_main = {name for n in kept for name in n.output} | names
        body.value_info.extend(v for v in self.model.graph.value_info if v.name in made_in_main)
        graph = made.graph
        if made is not self.model:
            graph.initializer.extend(t for t in self.model.graph.initializer if t.name in names)
        graph.initializer.extend(t for t in self.constants if t.name in names)
        for field in ("node", "value_info", "output"):
            graph.ClearField(field)
        graph.MergeFrom(body)
        graph.input.extend(info(v) for v in extra)
        graph.output.extend(outputs)
        return Program(made, tuple(v.name for v in extra), tuple(o.name for o in outputs[own:]))

    def _states(self, symbols: frozenset[str]) -> dict[str, StateTensor]:
        """Every tensor of the policy's state; those of a second stream have its number in their names."""
        found: dict[str, StateTensor] = {}

        def add(name: str, slot: Slot, stream: int) -> None:
            kind: Value | None = self.before[stream]._replace(shape=())
            if slot.like:
                kinds = {"signal": self.signal, "tap": self.tap}
                kind = {**kinds, "before": self.before[stream], "after": self.after[stream]}[slot.like]
            if kind is None:
                raise HastenError(
                    f"{self.policy.name} keeps a tensor like its {slot.like}, which this graph does not show"
                )
            if unknown := [s for s in kind.shape if isinstance(s, str) and not settled(s, symbols)]:
                raise HastenError(
                    f"{self.policy.name} keeps a tensor like {kind.name}, whose size {unknown[0]!r} does not follow "
                    "from the sizes of the model's inputs; give the inputs fixed shapes"
                )
            shape = (slot.copies, *kind.shape) if slot.copies else kind.shape
            found[name] = StateTensor(PREFIX + name, slot.dtype or kind.dtype, shape, slot.start)

        for name, slot in self.decision.slots().items():
            add(name, slot, 0)
        for stream, payload in enumerate(self.payloads):
            for name, slot in payload.slots().items():
                add(_slot(name, stream), slot, stream)
        return found


def _slot(name: str, stream: int) -> str:
    return f"{name}_{stream}" if stream else name
