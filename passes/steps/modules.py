"""Attention and feed-forward modules one by one: what each adds to the stream, without the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from hasten.errors import UsageError, nearest
from hasten.passes.steps.blocks import attends
from hasten.passes.steps.flow import V
from hasten.passes.steps.pairs import Pairs
from hasten.passes.steps.stack import Stack
from hasten.passes.steps.stream import Step
from hasten.passes.steps.taps import ungated

KINDS = ("attn", "cross-attn", "ff", "attn-ff", "side-attn", "side-ff")
"""``attn`` and ``cross-attn``: the first and further attentions of a block; ``attn-ff``: the only module of a block
that has both; ``side-``: modules of the stream beside the main one, as the text's in FLUX."""


@dataclass(frozen=True)
class Module(Generic[V]):
    """One module: its kind, the number of its block (from 0), and its result."""

    kind: str
    block: int
    stream: int
    value: V

    @property
    def name(self) -> str:
        """``attn-13``."""
        return f"{self.kind}-{self.block}"


def find_modules(stack: Stack[V]) -> list[Module[V]]:
    """Every module of the stack, block after block."""
    found: list[Module[V]] = []
    seen: set[V] = set()
    for number, block in enumerate(stack.blocks):
        for kind, step in _kinds(stack, block.steps):
            seen.add(step.value)
            found.append(Module(kind, number, stack.main, ungated(stack.flow, step)))
        for side in stack.sides:
            for step in stack.between(side, number):
                if step.value not in seen:
                    seen.add(step.value)
                    kind = "side-attn" if attends(stack.flow, step) else "side-ff"
                    found.append(Module(kind, number, side, ungated(stack.flow, step)))
    return found


def _kinds(stack: Stack[V], steps: Sequence[Step[V]]) -> list[tuple[str, Step[V]]]:
    named: list[tuple[str, Step[V]]] = []
    for step in steps:
        if not attends(stack.flow, step):
            named.append(("ff", step))
        elif len(steps) == 1:
            named.append(("attn-ff", step))
        else:
            named.append(("cross-attn" if any(k == "attn" for k, _ in named) else "attn", step))
    return named


def module_pairs(stack: Stack[V], wanted: Sequence[str]) -> Pairs[V]:
    """All modules of the wanted kinds or names, all where none is; ``before`` is the stack's, for each."""
    modules = find_modules(stack)
    known = dict.fromkeys([*(m.kind for m in modules), *(m.name for m in modules)])
    for name in wanted:
        if name not in known:
            kinds = ", ".join(dict.fromkeys(m.kind for m in modules))
            raise UsageError(
                f"modules: {name!r} is none of this graph's; there are {kinds}, and each with a block's number, as "
                f"{modules[0].name}.{nearest(name, known)}"
            )
    chosen = [m for m in modules if not wanted or m.kind in wanted or m.name in wanted]
    before = [stack.source(m.stream, 0) for m in chosen]
    return Pairs(
        tuple(b for b in before if b is not None),
        tuple(m.value for m, b in zip(chosen, before, strict=True) if b is not None),
        (),
        "a module's result is nothing that was added to what comes in",
    )
