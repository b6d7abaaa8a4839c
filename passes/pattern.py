"""Patterns over a neutral operator vocabulary, and the one matcher that every graph shares.

A rule names operators such as ``group_norm`` or ``sigmoid``; a `GraphView` tells the matcher which node of an FX or
ONNX graph is which of those. Nothing here imports torch or onnx.

The vocabulary (operands; attributes): ``add sub mul div pow`` (two operands), ``neg exp erf tanh sqrt rsqrt sigmoid
silu``, ``gelu`` (approximate), ``softmax`` (axis), ``cast`` (to), ``identity``, ``matmul``, ``baddbmm`` (beta,
alpha), ``einsum`` (equation), ``sdpa`` (scale, causal, gqa), ``group_norm`` (x, weight?, bias?; groups, eps),
``instance_norm`` (x, weight?, bias?; eps), ``mean var sum max`` (axes, keepdims; var: correction), ``reshape`` (x),
``transpose`` (perm), ``expand``, ``repeat`` (axis, times), ``part`` (axis, index, parts), ``where`` (condition, a,
b), ``masked_fill`` (x, mask, value), ``conv1d conv2d conv3d`` (x, weight, bias?; stride, padding, dilation, groups),
``linear`` (x, weight, bias?; out_axis: the weight's axis that is the result's last), ``batch_norm`` (x, weight?, bias?,
mean?, var?; eps, training),
``upsample_nearest`` (scale), ``pad`` (pads, value), ``pad_reflect pad_replicate pad_circular`` (pads), ``filled`` (a
tensor of one number, shaped like x), ``any eq isnan logical_not logical_and logical_or``. Axes are never negative in
a view's answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

V = TypeVar("V", bound=Hashable)
Attr = Any
Dim = int | str
"""A static size, or the name of a symbolic one. Two dims are known to be equal if they compare equal."""

COMMUTATIVE = frozenset({"add", "mul"})
_TOLERANCE = {"float16": 2e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class OpView(Generic[V]):
    """What one node looks like in the neutral vocabulary. An absent optional operand is None."""

    name: str
    inputs: tuple[V | None, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)


class GraphView(Protocol[V]):
    """What the matcher and the rules need of a graph. `passes.fx.view` and `passes.onnx.view` implement it.

    ``rule`` is the name of the rule at work; every node emitted meanwhile carries it.
    """

    rule: str

    def values(self) -> Iterable[V]:
        """Every value that a node makes, producers before users."""

    def op(self, value: V, /) -> OpView[V] | None:
        """The node that makes ``value``; None for inputs, constants and operators outside the vocabulary."""

    def describe(self, value: V, /) -> str:
        """What makes ``value``, in the graph's own words: ``aten.silu``, ``Sigmoid``, ``an input``."""

    def constant(self, value: V, /) -> npt.NDArray[Any] | None:
        """The content of a value that does not depend on any input, where it is small enough to look at."""

    def weights(self, value: V, /) -> npt.NDArray[Any] | None:
        """The content of a parameter, buffer or initializer that the graph itself holds, of any size.

        None for what comes in from outside, may be exchanged by the graph's owner, or is changed in the graph.
        """

    def shape(self, value: V, /) -> tuple[Dim, ...] | None:
        """Sizes; None where the rank is unknown."""

    def dtype(self, value: V, /) -> str | None:
        """Numpy's name of the element type, or ``bfloat16``."""

    def uses(self, value: V, /) -> int:
        """How many operand slots (and graph outputs) read ``value``."""

    def obstacle(self, first: Iterable[V], root: V, /) -> str | None:
        """Why values ``first`` cannot be computed at ``root`` instead: a tensor is changed in place between."""

    def sharing(self, value: V, source: V, /) -> str | None:
        """Why users of ``value`` cannot read ``source`` itself: its memory is changed, or seen by somebody else."""

    def where(self, value: V, /) -> str:
        """A name that a user can find again."""

    def emit(self, name: str, inputs: list[V | None], attrs: Mapping[str, Attr], *, at: V) -> V:
        """A new node of neutral operator ``name`` placed right before the node that makes ``at``; returns its value."""

    def emit_constant(self, content: npt.NDArray[Any], *, at: V) -> V:
        """A new constant."""

    def number(self, number: float, *, like: V, at: V) -> V:
        """A scalar operand of ``like``'s element type."""

    def substitute(self, old: V, new: V) -> None:
        """Let every user of ``old`` read ``new`` instead."""

    def discard(self) -> None:
        """Remove what was emitted since the last substitution: the replacement did not verify."""


@dataclass
class Match(Generic[V]):
    """What a match bound: values, attributes and tags by name, and the operand slots it went through."""

    values: dict[str, V | None] = field(default_factory=dict)
    attrs: dict[str, Attr] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    edges: dict[tuple[V, int], V] = field(default_factory=dict)
    ops: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> V:
        value = self.values[name]
        if value is None:
            raise KeyError(f"{name} is an absent operand")
        return value

    def copy(self) -> Match[V]:
        return Match(dict(self.values), dict(self.attrs), dict(self.tags), dict(self.edges), list(self.ops))

    def take(self, other: Match[V]) -> None:
        self.values, self.attrs, self.tags = other.values, other.attrs, other.tags
        self.edges, self.ops = other.edges, other.ops


@dataclass(frozen=True)
class Miss:
    """Why a match failed, and how far it got. False, so that a caller can write ``if not (found := match(...))``."""

    reason: str
    ops: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return False


class Pattern(Protocol):
    """Anything that can be looked for. ``search`` extends ``found`` and returns None, or says why not."""

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None: ...


@dataclass(frozen=True)
class Var:
    """Matches any value and binds it; the same name twice must be the same value. ``optional`` also matches absence."""

    name: str
    optional: bool = False
    rank: int | None = None

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        if value is None and not self.optional:
            return f"{self.name} is absent"
        if self.name in found.values and not _same(view, found.values[self.name], value):
            return f"{self.name} would be two different values"
        if value is not None and self.rank is not None:
            shape = view.shape(value)
            if shape is None or len(shape) != self.rank:
                return f"{view.where(value)} has shape {shape}, not {self.rank} axes"
        found.values.setdefault(self.name, value)
        return None


def _same(view: GraphView[V], a: V | None, b: V | None) -> bool:
    """Equal values, looking through identities."""
    return a == b or (a is not None and b is not None and through(view, a) == through(view, b))


def through(view: GraphView[V], value: V) -> V:
    """``value`` without the identities (inactive dropout, clone, contiguous, …) around it."""
    while (op := view.op(value)) is not None and op.name == "identity" and op.inputs[0] is not None:
        value = op.inputs[0]
    return value


def scalar(view: GraphView[V], value: V | None, *, filled: bool = False) -> float | None:
    """The number that a one-element constant holds, or None. ``filled`` also takes a tensor of equal elements."""
    if value is None or (content := view.constant(value)) is None or content.size == 0:
        return None
    if content.dtype.kind not in "fiub" or not (content.size == 1 or filled):
        return None
    first = content.reshape(-1)[0]
    return float(first) if content.size == 1 or bool((content == first).all()) else None


def close(view: GraphView[V], value: V, got: float, wanted: float) -> bool:
    """``got`` equals ``wanted`` in the precision of ``value``'s type: exported half-precision constants are rounded."""
    if math.isinf(wanted) or math.isinf(got):
        return got == wanted
    return math.isclose(got, wanted, rel_tol=_TOLERANCE.get(view.dtype(value) or "", 1e-5), abs_tol=1e-12)


@dataclass(frozen=True)
class Const:
    """Matches a constant all of whose elements are ``value``."""

    value: float

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        got = scalar(view, value, filled=True)
        if value is not None and got is not None and close(view, value, got, self.value):
            return None
        return f"{view.where(value) if value is not None else 'an absent operand'} is not the constant {self.value:g}"


@dataclass(frozen=True)
class Op:
    """Matches one operator.

    ``attrs`` must be equal; ``binds`` are attributes the rule reads later, under these names.
    """

    name: str
    args: tuple[Pattern, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    binds: tuple[str, ...] = ()

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        if value is None:
            return f"an absent operand is not {self.name}"
        value = enter(view, value, found)
        op = view.op(value)
        if op is None or op.name != self.name:
            return f"{view.where(value)} is {view.describe(value)}, not {self.name}"
        for key, wanted in self.attrs:
            if op.attrs.get(key) != wanted:
                return f"{view.where(value)}: {key} is {op.attrs.get(key)!r}, not {wanted!r}"
        if len(op.inputs) != len(self.args):
            return f"{view.where(value)}: {self.name} has {len(op.inputs)} operands, not {len(self.args)}"
        found.ops.append(self.name)
        slots = list(range(len(op.inputs)))
        orders = [slots, slots[::-1]] if self.name in COMMUTATIVE else [slots]
        best: tuple[int, str, list[str]] | None = None
        for order in orders:
            trial = found.copy()
            reason = None
            for pattern, slot in zip(self.args, order, strict=True):
                operand = op.inputs[slot]
                if operand is not None:
                    trial.edges[value, slot] = operand
                if (reason := pattern.search(view, operand, trial)) is not None:
                    break
            if reason is None:
                bound = {k: op.attrs[k] for k in self.binds}
                if clash := next((k for k, v in bound.items() if trial.attrs.get(k, v) != v), None):
                    reason = f"{clash} is {trial.attrs[clash]!r} and {bound[clash]!r}"
                else:
                    trial.attrs.update(bound)
                    found.take(trial)
                    return None
            if best is None or len(trial.ops) > best[0]:
                best = (len(trial.ops), reason, trial.ops)
        assert best is not None
        found.ops = best[2]
        return best[1]


def enter(view: GraphView[V], value: V, found: Match[V]) -> V:
    """`through`, noting the operand slots passed."""
    while (op := view.op(value)) is not None and op.name == "identity" and op.inputs[0] is not None:
        found.edges[value, 0] = op.inputs[0]
        value = op.inputs[0]
    return value


@dataclass(frozen=True)
class OneOf:
    """Matches the first alternative that matches; with ``name``, the alternative's tag is bound under it."""

    choices: tuple[tuple[str, Pattern], ...]
    name: str = ""

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        closest: tuple[int, str, list[str]] = (-1, "no alternative", [])
        for tag, pattern in self.choices:
            trial = found.copy()
            reason = pattern.search(view, value, trial)
            if reason is None:
                if self.name:
                    trial.tags[self.name] = tag
                found.take(trial)
                return None
            if len(trial.ops) > closest[0]:
                closest = (len(trial.ops), reason, trial.ops)
        found.ops = closest[2]
        return closest[1]


@dataclass(frozen=True)
class As:
    """Matches what ``pattern`` matches and binds that value to ``name``."""

    name: str
    pattern: Pattern

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        reason = Var(self.name).search(view, value, found)
        return reason if reason is not None else self.pattern.search(view, value, found)


@dataclass(frozen=True)
class Checked:
    """Matches what ``pattern`` matches if ``check(view, found)``, which may bind more, has nothing against it.

    Unlike a rule's guard, a failing check lets a `OneOf` around it try its next alternative.
    """

    pattern: Pattern
    check: Callable[[GraphView[Any], Match[Any]], str | None]

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        reason = self.pattern.search(view, value, found)
        return reason if reason is not None else self.check(view, found)


@dataclass(frozen=True)
class Product:
    """Matches ``scale * a * b * …`` however it is associated, ordered, or written with powers and quotients."""

    scale: float
    factors: tuple[Pattern, ...]

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        if value is None:
            return "an absent operand is not a product"
        trial = found.copy()
        number, terms = _factors(view, value, trial, depth=6)
        if len(terms) != len(self.factors):
            return f"{view.where(value)} is a product of {len(terms)} factors, not {len(self.factors)}"
        if not close(view, value, number, self.scale):
            return f"{view.where(value)} has the constant factor {number:g}, not {self.scale:g}"
        trial.ops.append("mul")
        reason = "no order of the factors fits"
        for order in itertools.permutations(terms):
            attempt = trial.copy()
            reasons = (p.search(view, v, attempt) for p, v in zip(self.factors, order, strict=True))
            if (miss := next((r for r in reasons if r is not None), None)) is None:
                found.take(attempt)
                return None
            reason = miss
        return reason


def _factors(view: GraphView[V], value: V, found: Match[V], depth: int) -> tuple[float, list[V]]:
    """The constant and the other factors of a product."""
    value = enter(view, value, found)
    if (number := scalar(view, value)) is not None:
        return number, []
    op = view.op(value)
    if op is None or depth == 0 or op.name not in ("mul", "div", "pow", "neg"):
        return 1.0, [value]
    first = op.inputs[0]
    second = op.inputs[1] if len(op.inputs) > 1 else None
    if first is None:
        return 1.0, [value]
    if op.name == "neg":
        found.edges[value, 0] = first
        number, terms = _factors(view, first, found, depth - 1)
        return -number, terms
    power = scalar(view, second)
    if op.name == "pow":
        if power not in (2.0, 3.0):
            return 1.0, [value]
        found.edges[value, 0] = first
        number, terms = _factors(view, first, found, depth - 1)
        return number ** int(power), terms * int(power)
    if op.name == "div":
        if not power:
            return 1.0, [value]
        found.edges[value, 0] = first
        number, terms = _factors(view, first, found, depth - 1)
        return number / power, terms
    assert second is not None
    found.edges[value, 0], found.edges[value, 1] = first, second
    (left, a), (right, b) = _factors(view, first, found, depth - 1), _factors(view, second, found, depth - 1)
    return left * right, a + b


def match(pattern: Pattern, view: GraphView[V], root: V) -> Match[V] | Miss:
    """Match ``pattern`` at ``root``; a value inside the match may have no user outside it."""
    found: Match[V] = Match()
    reason = pattern.search(view, root, found)
    if reason is None:
        reason = outside_user(view, root, found)
    return found if reason is None else Miss(reason, tuple(found.ops))


def inner_values(found: Match[V], root: V) -> Iterator[V]:
    """Values computed inside a match, other than its root: the consumers of the operand slots it went through."""
    seen = set()
    for consumer, _ in found.edges:
        if consumer != root and consumer not in seen:
            seen.add(consumer)
            yield consumer


def outside_user(view: GraphView[V], root: V, found: Match[V]) -> str | None:
    """Uses are counted per operand slot: ``y * y`` reads y twice."""
    reads: dict[V, int] = {}
    for operand in found.edges.values():
        reads[operand] = reads.get(operand, 0) + 1
    inner = list(inner_values(found, root))
    for value in inner:
        if view.uses(value) > reads.get(value, 0):
            return f"{view.where(value)} ({view.describe(value)}) has a user outside the pattern"
    return view.obstacle(inner, root)
