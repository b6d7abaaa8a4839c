"""What a step cache can skip in a graph, found from how data flows.

`find` answers for a policy, or a granularity: the stream before and after the region, what is inside, what it reads
from outside, and what the decision looks at; or the reason why there is no such region. The same search serves FX and
ONNX graphs through `hasten.passes.steps.flow.DataFlow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from hasten.errors import UsageError, nearest
from hasten.passes.steps.flow import DataFlow, Flow, V
from hasten.passes.steps.modules import module_pairs
from hasten.passes.steps.pairs import Pairs, choose_pairs
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.skips import find_skips, skip_pairs
from hasten.passes.steps.span import SMALLEST, Kind, Refusal, Region, Tap
from hasten.passes.steps.stack import Stack, find_stack
from hasten.passes.steps.taps import denoised_input, find_signal, find_tap, time_input
from hasten.passes.steps.wish import Wish


def find(
    data: DataFlow[V], asked: Policy | Wish | str, region: str | None = None, *, time: str | None = None
) -> Region[V] | Refusal:
    """Find the region that a policy, a `Wish` or a granularity asks for.

    ``region`` is ``FIRST:LAST``, the blocks from FIRST up to LAST, which is left out; ``time`` the name of the
    timestep's input. Raises `UsageError` for an unknown granularity or module, or blocks that the graph does not have.
    """
    wish = Wish.of(asked, region, time)
    if wish.granularity not in _ENDS:
        raise UsageError(
            f"granularity {wish.granularity!r} is none of {', '.join(_ENDS)}.{nearest(wish.granularity, _ENDS)}"
        )
    flow = Flow(data)
    if len(flow.inputs) < 2:
        named = ", ".join(flow.inputs) or "nothing"
        return Refusal(f"the graph reads {named} alone; what denoises reads a timestep as well")
    draft = _ENDS[wish.granularity](flow, wish)
    return draft if isinstance(draft, Refusal) else _region(flow, wish, draft)


@dataclass(frozen=True)
class _Draft(Generic[V]):
    """The ends of a region, and the blocks that its signal is looked for in."""

    pairs: Pairs[V]
    blocks: tuple[int, int, int] | None = None
    stack: Stack[V] | None = None


def _stack(flow: Flow[V], wish: Wish) -> _Draft[V] | Refusal:
    """The blocks asked for: all but ``head`` and ``foot``, or those of ``region``."""
    stack = find_stack(flow)
    if isinstance(stack, str):
        return _refused(flow, stack)
    first, last = wish.blocks(len(stack.blocks))
    pairs = choose_pairs(stack, first, last)
    if isinstance(pairs, Refusal):
        return pairs
    if pairs.extra and find_skips(flow):
        return _refused(flow, "skip connections lead out of the blocks")
    return _Draft(pairs, (first, last, len(stack.blocks)), stack)


def _modules(flow: Flow[V], wish: Wish) -> _Draft[V] | Refusal:
    stack = find_stack(flow)
    if isinstance(stack, str) or find_skips(flow):
        return _refused(flow, stack if isinstance(stack, str) else "skip connections lead out of the blocks")
    return _Draft(module_pairs(stack, wish.modules), (0, len(stack.blocks), len(stack.blocks)), stack)


def _deep(flow: Flow[V], wish: Wish) -> _Draft[V] | Refusal:
    pairs = skip_pairs(flow, wish.level)
    return pairs if isinstance(pairs, Refusal) else _Draft(pairs)


def _output(flow: Flow[V], wish: Wish) -> _Draft[V] | Refusal:
    """The whole model, from the input that is denoised to the first output."""
    source = denoised_input(flow)
    after, *others = dict.fromkeys(flow.outputs)
    if source is None:
        return Refusal(f"none of the inputs {', '.join(flow.inputs)} is like the output {flow.view.where(after)}")
    before, behind = flow.view.shape(source), flow.view.shape(after)
    differ = None if before == behind else f"the input has shape {before}, the output {behind}"
    return _Draft(Pairs((source,), (after,), tuple(others), differ))


def _refused(flow: Flow[V], reason: str) -> Refusal:
    deep = ", or for what is under a skip connection (deep)" if find_skips(flow) else ""
    return Refusal(f"{reason}; ask for the whole model (output){deep}")


_ENDS: Mapping[str, Callable[[Flow[Any], Wish], _Draft[Any] | Refusal]] = {
    "stack": _stack,
    "tail": _stack,
    "modules": _modules,
    "deep": _deep,
    "output": _output,
}
"""Granularity -> how the ends of its region are found."""


def _region(flow: Flow[V], wish: Wish, draft: _Draft[V]) -> Region[V] | Refusal:
    """Work out the inside, check it, and describe it."""
    pairs = draft.pairs
    signal = find_signal(flow, draft.stack, wish)
    tap = find_tap(flow, draft.stack, wish)
    for found in (signal, tap):
        if isinstance(found, Refusal):
            return found
    looked_at = _values(signal)
    needed = flow.above(looked_at)
    if early := next((v for v in pairs.after if v in needed and v not in pairs.before), None):
        return Refusal(f"what the decision looks at depends on {flow.view.where(early)}, the result of the region")
    given = {*pairs.after, *pairs.extra}
    outside = flow.above(flow.outputs, given) | flow.above(pairs.before, given) | needed
    inside = [v for v in flow.values if not any(m in outside for m in flow.data.made_with(v))]
    if problem := _effects(flow, set(inside), pairs):
        return Refusal(problem)
    work, total = flow.flops(inside), flow.flops(flow.values)
    if work < SMALLEST * total:
        return Refusal(
            f"the region has {work / total:.1%} of the operations, less than the {SMALLEST:.0%} that make a cache pay"
        )
    named = dict.fromkeys([*pairs.before, *pairs.after, *pairs.extra, *looked_at, *_values(tap)])
    return Region(
        granularity=wish.granularity,
        before=pairs.before,
        after=pairs.after,
        extra=pairs.extra,
        live_in=tuple(_live_in(flow, inside)),
        inside=tuple(inside),
        flops=work,
        total_flops=total,
        blocks=draft.blocks,
        signal=signal if isinstance(signal, Tap) else None,
        tap=tap if isinstance(tap, Tap) else None,
        time=time_input(flow, wish.time),
        no_residual=pairs.no_residual,
        names={v: flow.view.where(v) for v in named},
        kinds={v: _kind(flow, v) for v in named},
    )


def _values(tap: Tap[V] | Refusal | None) -> list[V]:
    return [v for v in (tap.value, tap.base) if v is not None] if isinstance(tap, Tap) else []


def _live_in(flow: Flow[V], inside: list[V]) -> list[V]:
    """What the inside reads from outside: inputs and what is made from them, no parameters."""
    within, given = set(inside), set(flow.inputs.values())
    read = dict.fromkeys(o for v in inside for o in flow.operands(v) if o not in within)
    return [v for v in read if v in given or flow.place(v) >= 0]


def _kind(flow: Flow[V], value: V) -> Kind:
    return Kind(flow.view.shape(value), flow.view.dtype(value), math.prod(flow.data.sizes(value) or ()))


def _effects(flow: Flow[V], inside: set[V], pairs: Pairs[V]) -> str | None:
    """Why the inside may not be left out: it does more than make values."""
    if drawn := next((v for v in flow.values if v in inside and flow.data.draws(v)), None):
        return f"{flow.view.where(drawn)} draws random numbers inside the region"
    ends = {flow.data.owner(v) for v in (*pairs.before, *pairs.after, *pairs.extra)}
    earlier = flow.above(pairs.before) if flow.written else set()
    for node, owner in flow.written.items():
        if (node in inside and owner not in inside) or (owner in ends and node not in earlier):
            return f"{flow.view.where(node)} writes in place to {flow.view.where(owner)}, which is not the region's own"
    return None
