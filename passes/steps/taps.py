"""What a decision looks at: values found from how they are made, not from the names of modules."""

from __future__ import annotations

from hasten.passes.steps.blocks import attends
from hasten.passes.steps.flow import Flow, V
from hasten.passes.steps.pairs import choose_pairs
from hasten.passes.steps.span import Refusal, Tap
from hasten.passes.steps.stack import Stack
from hasten.passes.steps.stream import Step
from hasten.passes.steps.wish import Wish


def find_signal(flow: Flow[V], stack: Stack[V] | None, wish: Wish) -> Tap[V] | Refusal | None:
    """What the decision looks at, outside the region."""
    if not wish.signal:
        return None
    if wish.signal == "input":
        source = denoised_input(flow)
        return Refusal("no input is like the output") if source is None else _tap(flow, wish.signal, source)
    if stack is None:
        return Refusal(f"the policy looks at {wish.signal}, which only a region of blocks has")
    if wish.signal == "modulated":
        return _tap(flow, wish.signal, modulated(stack))
    if wish.signal == "time-embedding":
        embedding = time_embedding(stack, wish.time)
        if embedding is None:
            named = ", ".join(flow.inputs)
            return Refusal(f"no embedding of the timestep was found among the inputs {named}; say which it is: time=")
        return _tap(flow, wish.signal, embedding)
    first, _ = wish.blocks(len(stack.blocks))
    if not first:
        return Refusal("a probe needs at least one block before the region: head=1")
    probe = choose_pairs(stack, 0, first)
    if isinstance(probe, Refusal) or probe.no_residual is not None:
        return Refusal(f"the first {first} blocks have no residual to look at")
    return _tap(flow, wish.signal, probe.after[0], probe.before[0])


def find_tap(flow: Flow[V], stack: Stack[V] | None, wish: Wish) -> Tap[V] | Refusal | None:
    """What the decision looks at inside the region."""
    if not wish.tap:
        return None
    if stack is None:
        return Refusal(f"the policy looks at {wish.tap}, which only a region of blocks has")
    return _tap(flow, wish.tap, attention_residual(stack))


def _tap(flow: Flow[V], name: str, value: V, base: V | None = None) -> Tap[V]:
    inputs = flow.depends_on(value) | (flow.depends_on(base) if base is not None else frozenset())
    return Tap(name, value, base, inputs)


def modulated(stack: Stack[V]) -> V:
    """What block 0's first layer reads: its modulated normalisation, or the plain one, or the stream itself.

    Where it reads that of two streams together, as in CogVideoX, it is the main one's.
    """
    flow, step = stack.flow, stack.blocks[0].steps[0]
    first = stack.source(stack.main, 0)
    reached = flow.below([first] if first is not None else [])
    layer = next((v for v in step.path if flow.flops([v])), None)
    if layer is None:
        return step.x
    value = _unmoved(flow, next(o for o in flow.operands(layer) if o in reached))
    while (joined := flow.data.joined(value)) is not None:
        own = [p for p in joined.parts if p in reached]
        if len(own) != 1:
            break
        value = _unmoved(flow, own[0])
    return value


def _unmoved(flow: Flow[V], value: V) -> V:
    """``value`` before casts and what else does not even reorder it."""
    while (op := flow.view.op(value)) is not None and op.name in ("identity", "cast") and op.inputs[0] is not None:
        value = op.inputs[0]
    return value


def time_input(flow: Flow[V], name: str | None = None) -> str | None:
    """The graph input that is the timestep: the one called ``name``, or so, else the only small one."""
    small = [n for n, v in flow.inputs.items() if len(flow.data.sizes(v) or (0, 0)) <= 1]
    if name is not None:
        return next((n for n in flow.inputs if n == name or n.strip("_").removeprefix("l_").strip("_") == name), None)
    for word in ("timestep", "time", "sigma"):
        named = [n for n in small if word in n.lower()]
        if len(named) == 1:
            return named[0]
    return small[0] if len(small) == 1 else None


def denoised_input(flow: Flow[V]) -> V | None:
    """The graph input that is most like the first output: of its rank, floating, with most sizes equal."""
    like = flow.data.sizes(flow.outputs[0])
    found: list[tuple[int, V]] = []
    for value in flow.inputs.values():
        sizes, dtype = flow.data.sizes(value), flow.view.dtype(value) or ""
        if sizes is not None and like is not None and len(sizes) == len(like) and "float" in dtype:
            found.append((sum(a == b for a, b in zip(sizes, like, strict=True)), value))
    return max(found, key=lambda f: f[0])[1] if found else None


def time_embedding(stack: Stack[V], name: str | None = None) -> V | None:
    """The embedding of the timestep, and of nothing else, that the blocks share.

    It is the result of the second linear layer above the sinusoids where there are two, else the last value of its
    kind. Where every block embeds the timestep anew, as in DiT, it is the first block's; where it is no modulation but
    a token of the stream, as in Stable Audio, the graph's.
    """
    flow, wanted = stack.flow, time_input(stack.flow, name)
    if wanted is None:
        return None
    read = [flow.above([b.steps[-1].value], {b.steps[0].x}) for b in stack.blocks]
    for blocks in (read, read[:1], [flow.above(flow.outputs)]):
        common = set.intersection(*blocks)
        own = [v for v in flow.values if v in common and flow.depends_on(v) == {wanted}]
        own = [v for v in own if len(flow.data.sizes(v) or ()) > 1]
        layers = [v for v in own if _is_linear(flow, v)]
        if layers:
            return layers[min(1, len(layers) - 1)]
    return None


def _is_linear(flow: Flow[V], value: V) -> bool:
    """A layer with a weight, of more than one feature: not the product of times and frequencies."""
    op = flow.view.op(value)
    if op is None or op.inputs[0] is None or op.name not in ("linear", "matmul"):
        return False
    sizes = flow.data.sizes(op.inputs[0])
    return sizes is not None and sizes[-1] > 1


def attention_residual(stack: Stack[V]) -> V:
    """What attention adds to the stream, gated, in the block at half depth; the last kind's, as the temporal one."""
    kinds = sorted({b.kind for b in stack.blocks})
    repeated = [[b for b in stack.blocks if b.kind == k] for k in kinds]
    alternate = len(kinds) == 2 and stack.blocks[0].kind != stack.blocks[1].kind
    blocks = repeated[1] if alternate else list(stack.blocks)
    steps = blocks[(len(blocks) - 1) // 2].steps
    return next((s for s in steps if attends(stack.flow, s)), steps[0]).change


def ungated(flow: Flow[V], step: Step[V]) -> V:
    """A module's own result: the change without the gate that it is multiplied with."""
    value, path = step.change, set(step.path)
    while True:
        op = flow.view.op(value)
        if (moved := flow.moved(value)) is not None and moved in path:
            value = moved
        elif op is not None and op.name == "mul":
            inner = [o for o in op.inputs if o in path]
            if len(inner) != 1 or inner[0] is None:
                return value
            value = inner[0]
        else:
            return value
