"""What a search for a region answers: the region, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic

from hasten.passes.steps.flow import V
from hasten.passes.steps.policy import Policy, Slot

SMALLEST = 0.1
"""A region with less than this share of the operations is refused: the bookkeeping would eat what it saves."""

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


@dataclass(frozen=True)
class Kind:
    """Shape and type of a value; ``elements`` by the sizes of the example."""

    shape: tuple[int | str, ...] | None
    dtype: str | None
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * _BYTES.get(self.dtype or "", 1)


@dataclass(frozen=True)
class Refusal:
    """No region, and why; false, so that a caller can write ``if not (found := find(...))``."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Tap(Generic[V]):
    """``value``, or what ``value`` has gained over ``base``. ``inputs``: the graph inputs that it depends on."""

    name: str
    value: V
    base: V | None
    inputs: frozenset[str]


@dataclass(frozen=True)
class Region(Generic[V]):
    """A part of a graph that a reused call leaves out.

    ``before`` and ``after`` are the streams into and out of it, pairwise: one pair for each stream that is read after
    the region. ``extra``: other values made inside and read outside, to be kept as they were. ``live_in``: what the
    inside reads from outside, parameters left out. ``inside``: what need not be made where ``after`` and ``extra`` are
    given, in order; the signal and what it needs are outside. ``blocks``: first (from 0), last (left out) and number
    of all. ``time``: the input that is the timestep, where it can be told. ``no_residual``: why ``after - before`` is
    no payload, None where it is one; the value itself always is.
    """

    granularity: str
    before: tuple[V, ...]
    after: tuple[V, ...]
    extra: tuple[V, ...]
    live_in: tuple[V, ...] = field(repr=False)
    inside: tuple[V, ...] = field(repr=False)
    flops: int
    total_flops: int
    blocks: tuple[int, int, int] | None
    signal: Tap[V] | None
    tap: Tap[V] | None
    time: str | None
    no_residual: str | None
    names: Mapping[V, str] = field(repr=False)
    kinds: Mapping[V, Kind] = field(repr=False)

    @property
    def share(self) -> float:
        """The part of the graph's operations that is inside."""
        return self.flops / max(1, self.total_flops)

    @property
    def foldable(self) -> bool:
        """Whether a decision on the signal depends on the timestep alone: it is a mask, known before the run."""
        return self.signal is not None and self.signal.inputs == {self.time}

    def slot_bytes(self, slot: Slot, stream: int = 0) -> int:
        """The size of one array of state, with its copies; that of a pair of streams is a pair's own."""
        if not slot.like:
            return _BYTES.get(slot.dtype, 1) * max(1, slot.copies)
        tap = {"signal": self.signal, "tap": self.tap}.get(slot.like)
        if slot.like in ("signal", "tap"):
            kind = self.kinds[tap.value] if tap is not None else Kind((), None, 0)
        else:
            kind = self.kinds[(self.before if slot.like == "before" else self.after)[stream]]
        return kind.elements * _BYTES.get(slot.dtype or kind.dtype or "", 1) * max(1, slot.copies)

    def state_bytes(self, policy: Policy) -> int:
        """All state that ``policy`` keeps for this region: the payload's once for every pair of streams."""
        own = sum(self.slot_bytes(s) for s in policy.decision.slots().values())
        kept = policy.payload.slots().values()
        extra = sum(self.kinds[v].bytes for v in self.extra)
        return own + extra + sum(self.slot_bytes(s, i) for i in range(len(self.after)) for s in kept)

    def describe(self, policy: Policy | None = None) -> list[str]:
        """Lines for a person: the region, its share, the streams, what the decision looks at, and the state's size."""
        what = f"the {self.granularity} region"
        if self.blocks is not None:
            first, last, number = self.blocks
            what = f"blocks {first} to {last - 1} of {number}" if last - first > 1 else f"block {first} of {number}"
        lines = [f"{what}: {self.share:.1%} of the operations, {len(self.inside)} nodes"]
        shown = self.names
        if self.granularity == "modules":
            kept = sum(self.kinds[v].bytes for v in self.after)
            lines.append(
                f"{len(self.after)} modules, {shown[self.after[0]]} to {shown[self.after[-1]]}, {kept / 1e6:.3g} MB"
            )
        else:
            ends = zip(self.before, self.after, strict=True)
            lines += [f"stream {shown[b]} -> {shown[a]}, {_shape(self.kinds[a])}" for b, a in ends]
        if self.no_residual is not None:
            lines.append(f"payload value only: {self.no_residual}")
        lines += [f"kept as well: {shown[v]}, {_shape(self.kinds[v])}" for v in self.extra]
        for use, tap in (("decision", self.signal), ("inside", self.tap)):
            if tap is not None:
                lines.append(
                    f"{use} looks at {tap.name}: {shown[tap.value]}, {_shape(self.kinds[tap.value])}, "
                    f"from {', '.join(sorted(tap.inputs)) or 'nothing'}"
                )
        if self.foldable:
            lines.append("the decision depends on the timestep alone: it can be a mask, made before the run")
        if policy is not None:
            lines.append(f"state of {policy.name}: {self.state_bytes(policy) / 1e6:.3g} MB")
        return lines


def _shape(kind: Kind) -> str:
    return f"{kind.dtype} ({', '.join(str(d) for d in kind.shape or ())})"
