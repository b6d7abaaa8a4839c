"""Blocks: the steps of a residual stream that repeat.

Two steps are alike if the operators on their ways from the stream to the addition are. A row of steps is cut into the
repetitions that cover most of it; where the repeated part has several layers of attention each followed by an MLP, as
in models with spatial and temporal blocks, it is several blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from hasten.passes.steps.flow import Flow, V
from hasten.passes.steps.stream import Step

_LONGEST = 12
"""Steps of a repeated part, at most: a spatial and a temporal block with three each are six."""


@dataclass(frozen=True)
class Block(Generic[V]):
    """One block: its additions in order. Blocks of one ``kind`` are alike."""

    steps: tuple[Step[V], ...]
    kind: int


def find_blocks(flow: Flow[V], steps: Sequence[Step[V]]) -> list[Block[V]]:
    """Cut the steps of one stream into blocks; empty where nothing repeats.

    What does not attend at either end, where other blocks do, is left out.
    """
    marks = [_signature(flow, s) for s in steps]
    heads = [attends(flow, s) for s in steps]
    starts: list[int] = []
    at, repeats = 0, False
    while at < len(steps):
        length, times = _repetition(marks, at)
        if times > 1:
            repeats = True
            offsets = [i for i in range(length) if heads[at + i] and not heads[at + (i - 1) % length]] or [0]
            starts += [at + n * length + offset for n in range(times) for offset in offsets]
        elif heads[at] or not starts or not all(heads[starts[-1] : at]):
            starts.append(at)
        at += length * times
    cuts = list(zip(starts, [*starts[1:], len(steps)], strict=True)) if repeats else []
    attending = [i for i, (first, last) in enumerate(cuts) if any(heads[first:last])]
    if attending:
        cuts = cuts[attending[0] : attending[-1] + 1]
    kinds: dict[tuple[frozenset[tuple[str, int]], ...], int] = {}
    return [Block(tuple(steps[a:b]), kinds.setdefault(tuple(marks[a:b]), len(kinds))) for a, b in cuts]


def _signature(flow: Flow[V], step: Step[V]) -> frozenset[tuple[str, int]]:
    """The operators of a step and how many there are of each; moves do not count."""
    counted = Counter(flow.data.name(v) for v in step.path if flow.moved(v) is None and flow.data.piece(v) is None)
    return frozenset(counted.items())


def attends(flow: Flow[V], step: Step[V]) -> bool:
    """Whether the step multiplies what it computes from the stream with each other: attention, linear or not."""
    path = set(step.path)
    for value in step.path:
        op = flow.view.op(value)
        if "attention" in flow.data.name(value).lower() or (op is not None and op.name in ("sdpa", "softmax")):
            return True
        if op is not None and op.name in ("matmul", "baddbmm", "einsum"):
            operands = [v for v in op.inputs if v is not None]
            if len(operands) > 1 and all(v in path for v in operands[-2:]):
                return True
    return False


def _repetition(marks: Sequence[object], at: int) -> tuple[int, int]:
    """The length and the number of the repetitions from ``at`` on that cover most steps; the shortest of those."""
    best = (1, 1)
    for length in range(1, _LONGEST + 1):
        times = 1
        while list(marks[at : at + length]) == list(marks[at + times * length : at + (times + 1) * length]):
            times += 1
            if at + times * length > len(marks):
                break
        if times > 1 and length * times > best[0] * best[1]:
            best = (length, times)
    return best
