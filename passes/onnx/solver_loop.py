"""A denoiser's ONNX model inside a ``Loop`` over the rows of a sampler's table: latents in, latents out, one graph.

The body is the whole network with guidance, the step cache's decision and the solver's arithmetic around it. Its state,
the sampler's and the cache's, is an input and an output of the model as well, so that a run may be cut into chunks:
rows ``first`` to ``stop`` are done by one call. Weights of the network stand in the body, where a runtime that lays
them out for its kernels looks for them. Where every decision is known, the rows can stand one behind another instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from hasten.passes.onnx.parts import live
from hasten.passes.onnx.protos import Known, copied, info, renamed
from hasten.passes.onnx.step_cache import COMPUTED, require_opset
from hasten.passes.onnx.traced import Value, fresh, own_names, rename, trace
from hasten.passes.onnx.unroll import unrolled
from hasten.passes.solvers import loop, names
from hasten.passes.solvers.names import (
    BRANCHES,
    CACHE,
    DECISIONS,
    FIRST,
    FORCED,
    NEXT,
    NOISE,
    PREVIEW,
    RESCALE,
    RESULT,
    SCALE,
    SEED,
    STATE,
    STOP,
)
from hasten.passes.solvers.plan import NEGATIVE, LoopPlan, Shaped

RULE = "solver-loop"


def solver_loop(
    model: onnx.ModelProto,
    plan: LoopPlan,
    kept: Sequence[Shaped] = (),
    controls: Sequence[Shaped] = (),
    bits: Sequence[bool] | None = None,
) -> onnx.ModelProto:
    """Wrap ``model`` in its loop; ``kept`` is the state of the step cache in it, and ``controls`` are its numbers.

    ``bits`` are the decisions of all rows, where they are to be unrolled. Inputs and outputs are those of
    `passes.solvers.names`, without those that an unrolled loop does not need: the rows to be done, and what the step
    cache is told and keeps. ``model`` itself is changed.
    """
    return _Writer(model, plan, kept, controls).write(bits)


class _Writer:
    def __init__(
        self, model: onnx.ModelProto, plan: LoopPlan, kept: Sequence[Shaped], controls: Sequence[Shaped]
    ) -> None:
        self.model, self.plan, self.opset = model, plan, require_opset(model)
        known = Known(model)
        held = {t.name for t in model.graph.initializer}
        self.given = {v.name: known.value(v.name) for v in model.graph.input if v.name not in held}
        self.made = {v.name: known.value(v.name) for v in model.graph.output}
        self.prediction = next(iter(self.made.values()))
        self.kept = kept
        self.inputs = {s.name: Value(*vars(s).values()) for s in names.inputs(plan, kept, controls)}
        self.carried = self._carried()
        painted = (self.inputs[n] for n in (names.MASK, names.KNOWN, names.KNOWN_NOISE))
        self.painting = tuple(painted) if plan.inpaint else None
        ends = (RESULT, PREVIEW, *(NEXT + v.name for v in self.carried))
        self.reserved = {*self.inputs, *ends}
        self.names = {*self.reserved, *own_names(model.graph)}
        self.main: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self.decided: set[str] = set()
        taken = {t.name: self.fresh(f"loop/{t.name}") for t in model.graph.initializer if t.name in self.reserved}
        for tensor in model.graph.initializer:
            tensor.name = taken.get(tensor.name, tensor.name)
        for node in model.graph.node:
            rename(node, taken)

    def write(self, bits: Sequence[bool] | None) -> onnx.ModelProto:
        carried = self.carried
        before_loop = [self._start(value) for value in carried]
        if bits is not None:
            return self._unrolled(bits, before_loop)
        count = self.fresh("loop/count")
        self.main.append(self._node("Sub", [STOP, FIRST], count))
        going = self.fresh("loop/going")
        self.constants.append(helper.make_tensor(going, TensorProto.BOOL, (), [True]))
        body = self._body(carried)
        ends = [PREVIEW if v.name == PREVIEW else NEXT + v.name for v in carried]
        node = helper.make_node("Loop", [count, going, *before_loop], ends, name="solver_loop", body=body)
        node.metadata_props.add(key="hasten.rule", value=RULE)
        self.main.append(node)
        return self._finished(dict(zip(ends, carried, strict=True)))

    def _unrolled(self, bits: Sequence[bool], start: Sequence[str]) -> onnx.ModelProto:
        body = self._body(self.carried)
        rows = unrolled(body, bits, start, FIRST, self.decided, self.fresh)
        self.main += rows.nodes
        self.constants += rows.constants
        kept = {PREVIEW if v.name == PREVIEW else NEXT + v.name: v for v in self.carried}
        caches = {NEXT + s.name for s in names.carried_cache(self.plan, self.kept)}
        self.main += [
            self._identity(end, name) for end, name in zip(rows.ends, kept, strict=True) if name not in caches
        ]
        model = self._finished({name: value for name, value in kept.items() if name not in caches})
        _, read = live(model.graph.node, [v.name for v in model.graph.output])
        for field in ("input", "initializer"):
            needed = [v for v in getattr(model.graph, field) if v.name in read]
            model.graph.ClearField(field)
            getattr(model.graph, field).extend(needed)
        made = {name for n in model.graph.node for name in n.output}
        model.graph.value_info.extend(v for v in rows.infos if v.name in made)
        return model

    def _finished(self, ends: Mapping[str, Value]) -> onnx.ModelProto:
        """The model that returns ``ends``, what is carried by the names that it has behind the last row."""
        state = self.inputs[STATE]._replace(name=NEXT + STATE)

        def finished(output: Any, state: Any, painting: Any) -> Any:
            from hasten.passes.fx.solver_row import finished

            return (finished(output, state, painting),)

        output = self.inputs[loop.PREFIX + "output"]
        (latents,) = self._trace(self.main, "result", finished, output, state, self.painting)
        self.main.append(self._identity(latents.name, RESULT))
        *held, preview = (v._replace(name=end) for end, v in ends.items())
        return self._close([Value(RESULT, "float32", self.plan.latents), preview, *held])

    def _carried(self) -> list[Value]:
        caches = [s.name for s in names.carried_cache(self.plan, self.kept)]
        found = [STATE, *(n for n in (DECISIONS,) if n in self.inputs), *caches]
        return [*(self.inputs[n] for n in found), Value(PREVIEW, "float32", self.plan.latents)]

    def _start(self, value: Value) -> str:
        if value.name != PREVIEW:
            return value.name
        # any picture: a loop shows none before its first row
        zero, picture = self.fresh("loop/zero"), self.fresh("loop/picture")
        self.constants.append(helper.make_tensor(zero, TensorProto.INT64, (), [0]))
        self.main.append(self._node("Gather", [STATE, zero], picture, axis=0))
        return picture

    def _body(self, carried: Sequence[Value]) -> onnx.GraphProto:
        """The graph of one row."""
        plan, nodes = self.plan, list[onnx.NodeProto]()
        iteration, going = (Value(self.fresh(f"loop/{n}"), t, ()) for n, t in (("row", "int64"), ("go", "bool")))
        held = {v.name: v._replace(name=self.fresh(f"loop/{v.name}")) for v in carried}
        rows = loop.Rows(*(self.inputs.get(loop.PREFIX + name) for name in loop.Rows._fields))

        def before(rows: Any, first: Any, iteration: Any, state: Any, painting: Any, forced: Any) -> Any:
            from hasten.passes.fx.solver_row import before

            index = first + iteration
            force = None if forced is None else forced.index_select(0, index.reshape(1))[0]
            return index, force, *before(plan, loop.Rows(*rows), index, state, painting)

        forced = self.inputs[FORCED] if CACHE + "force" in self.given else None
        index, force, *row, seen, sample, time, which, beside = self._trace(
            nodes, "before", before, tuple(rows), self.inputs[FIRST], iteration, held[STATE], self.painting, forced
        )
        seen = seen._replace(shape=plan.latents)
        fed = {plan.sample.name: sample.name, plan.time.name: time.name, CACHE + "step": index.name}
        fed |= {s.name: v.name for s, v in ((plan.which, which), (plan.beside, beside)) if s is not None}
        if force is not None:
            fed[CACHE + "force"] = force.name
        calls = list[dict[str, Value]]()
        for number in range(plan.calls):
            if number and plan.follow:
                fed[CACHE + "force"] = self.fresh("loop/followed")
                nodes.append(self._node("Cast", [calls[0][COMPUTED].name], fed[CACHE + "force"], to=TensorProto.INT64))
            calls.append(self._call(nodes, number, fed, held))
        self.decided = {made[COMPUTED].name for made in calls if COMPUTED in made}
        predictions = [p for made in calls for p in self._predicted(nodes, made[self.prediction.name])]
        following = {
            value.name + branch: made[NEXT + value.name]
            for branch, made in zip(BRANCHES, calls, strict=False)
            for value in self.kept
            if NEXT + value.name in made
        }

        def after(
            row: Any,
            state: Any,
            seen: Any,
            predictions: Any,
            scale: Any,
            rescale: Any,
            z: Any,
            index: Any,
            shown: Any,
            hook: Any,
            decisions: Any,
            computed: Any,
        ) -> Any:
            from hasten.passes.fx.solver_row import after, noise_of, noted

            noise = noise_of(plan, z, index, seen)
            made = after(plan, loop.Row(*row), state, seen, predictions, scale, rescale, noise, shown, hook)
            return *made, None if computed is None else noted(plan, decisions, computed, index)

        scale = self.inputs.get(SCALE) if plan.guided else None
        noise = self.inputs.get(NOISE) or self.inputs.get(SEED)
        following[STATE], following[PREVIEW], decided = self._trace(
            nodes,
            "after",
            after,
            tuple(row),
            held[STATE],
            seen,
            predictions,
            scale,
            self.inputs.get(RESCALE),
            noise,
            index,
            held[PREVIEW],
            tuple(self.inputs[name] for name in names.HOOKS[plan.hook]),
            held.get(DECISIONS),
            calls[0].get(COMPUTED),
        )
        if decided is not None:
            following[DECISIONS] = decided
        ends = []
        for value in carried:
            ends.append(value._replace(name=self.fresh(f"loop/next/{value.name}")))
            nodes.append(self._identity(following.get(value.name, held[value.name]).name, ends[-1].name))
        on = self.fresh("loop/still")
        nodes.append(self._identity(going.name, on))
        inputs = [info(v) for v in (iteration, going, *held.values())]
        outputs = [helper.make_tensor_value_info(on, TensorProto.BOOL, ()), *(info(v) for v in ends)]
        nodes, read = live(nodes, [o.name for o in outputs])
        weights = [t for t in self.model.graph.initializer if t.name in read]
        body = helper.make_graph(nodes, "row", inputs, outputs, initializer=weights)
        made = {name for n in nodes for name in n.output}
        body.value_info.extend(v for v in self.infos if v.name in made)
        return body

    def _predicted(self, nodes: list[onnx.NodeProto], made: Value) -> list[Value]:
        """What a call predicts, in the loop's own sizes; both halves apart where their sum is not known."""
        plan = self.plan
        if not plan.doubled or not isinstance(plan.batch, str):
            return [made if plan.doubled else made._replace(shape=(plan.batch, made.shape[1], *plan.latents[2:]))]
        halves = [self.fresh(f"loop/{name}") for name in ("told", "untold")]
        split = helper.make_node("Split", [made.name], halves, name=f"{halves[0]}/Split", axis=0, num_outputs=2)
        split.metadata_props.add(key="hasten.rule", value=RULE)
        nodes.append(split)
        return [made._replace(name=name, shape=(plan.batch, made.shape[1], *plan.latents[2:])) for name in halves]

    def _call(
        self, nodes: list[onnx.NodeProto], number: int, before: Mapping[str, str], held: Mapping[str, Value]
    ) -> dict[str, Value]:
        """Write one call of the network, which reads ``before`` by its own names; returns its outputs by theirs."""
        plan, suffix = self.plan, BRANCHES[number]
        fed = dict(before)
        for condition in plan.conditions:
            fed[condition.name] = self._condition(condition, negative=bool(number))
        if plan.scale is not None:
            fed[plan.scale.name] = self._embedded(plan.scale)
        for value in self.kept:
            fed[value.name] = held[value.name + suffix].name
        weights = {t.name for t in self.model.graph.initializer}
        for name in dict.fromkeys(own_names(self.model.graph)):
            # of a second call every value, of the first what the graph around it has as well
            if (number or name in self.reserved) and name not in weights and name not in self.given:
                fed[name] = self.fresh(f"loop/{name}{suffix}")
        for node in self.model.graph.node:
            nodes.append(renamed(node, fed))
            nodes[-1].name += suffix if node.name else ""
        for value in self.model.graph.value_info:
            self.infos.append(copied(value))
            self.infos[-1].name = fed.get(value.name, value.name)
        return {name: v._replace(name=fed.get(name, name)) for name, v in self.made.items()}

    def _condition(self, condition: Shaped, *, negative: bool) -> str:
        if not self.plan.doubled:
            return (NEGATIVE if negative else "") + condition.name
        both = self.fresh(f"loop/{condition.name}")
        given = [condition.name, NEGATIVE + condition.name]
        self.main.append(self._node("Concat", given, both, axis=0))
        return both

    def _embedded(self, scale: Shaped) -> str:
        def spread(value: Any, state: Any) -> Any:
            from hasten.passes.fx.solver_row import spread

            return (spread(value, state, scale.dtype),)

        (found,) = self._trace(self.main, "scale", spread, self.inputs[SCALE], self.inputs[STATE])
        return str(found.name)

    def _close(self, outputs: Sequence[Value]) -> onnx.ModelProto:
        graph = self.model.graph
        for field in ("node", "value_info", "output", "input", "initializer"):
            graph.ClearField(field)
        nodes, _ = live(self.main, [v.name for v in outputs])
        graph.node.extend(nodes)
        graph.input.extend(info(v) for v in self.inputs.values())
        graph.output.extend(info(v) for v in outputs)
        graph.initializer.extend(self.constants)
        return self.model

    def _trace(self, nodes: list[onnx.NodeProto], base: str, function: Any, *operands: Any) -> Any:
        traced = trace(function, *operands, opset=self.opset, fresh=self.fresh, base=f"loop/{base}", rule=RULE)
        nodes += traced.nodes
        self.constants += traced.constants
        return traced.result

    def _node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        made = helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)
        made.metadata_props.add(key="hasten.rule", value=RULE)
        return made

    def _identity(self, source: str, name: str) -> onnx.NodeProto:
        return self._node("Identity", [source], name)

    def fresh(self, base: str) -> str:
        """A name that nothing has."""
        return fresh(base, self.names)
